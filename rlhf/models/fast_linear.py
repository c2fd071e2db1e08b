"""Frozen linear layers and LoRA on a CPU in float32: PEFT's numbers, sooner.

Two things cost there. torch multiplies float32 matrices with MKL; oneDNN, which torch carries for `torch.compile`,
takes as little as half the time for the few rows of a decoding step, less so for many, and gains once more if the
matrix is laid out for it. And PEFT computes `base(x) + B(A(x)) * scaling` as five operations, each of which writes a
tensor of the output's size or keeps one for backward; here the low-rank part is added into the base's output in place.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX")  # where this was tried
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
COPIES = 2**32  # bytes of weights up to which they are held a second time, laid out for oneDNN


def packed(weight):
    """A copy of a weight (out, in) as oneDNN likes to read it, for `product` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 8)  # rows to come: a hint


def product(x, weight, bias=None):
    """x W^T + bias without a gradient; x (rows, in), W (out, in), packed or not."""
    if ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class LoraSum(torch.autograd.Function):
    """y = x W^T + bias + scaling (d(x) A^T) B^T with W frozen; x (rows, in), W (out, in), A (r, in), B (out, r).

    d drops a share of x; of what it dropped a byte a number is kept.
    """

    @staticmethod
    def forward(ctx, x, weight, packed_weight, bias, a, b, scaling, drop):
        kept, mask = torch.native_dropout(x, drop, True) if drop else (x, None)
        low = kept @ a.T
        ctx.save_for_backward(x, weight, a, b, low, mask)
        ctx.scaling, ctx.drop = scaling, drop
        return product(x, packed_weight, bias).addmm_(low, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low, mask = ctx.saved_tensors
        grad_low = grad @ b
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad, weight.T)
            if mask is None:
                grad_x.addmm_(grad_low, a, alpha=ctx.scaling)
            else:
                grad_x.addcmul_(grad_low @ a, mask, value=ctx.scaling / (1 - ctx.drop))
        if ctx.needs_input_grad[4]:
            kept, scaling = (x, ctx.scaling) if mask is None else (x * mask, ctx.scaling / (1 - ctx.drop))
            grad_a = (grad_low.T @ kept).mul_(scaling)
        if ctx.needs_input_grad[5]:
            grad_b = (grad.T @ low).mul_(ctx.scaling)
        return grad_x, None, None, None, grad_a, grad_b, None, None


def lora_forward(self, x, *args, **kwargs):
    """In place of a LoRA layer's own forward; whatever is not the plain case goes there."""
    base, active, off, grads = self.base_layer, self.active_adapters, self.disable_adapters, torch.is_grad_enabled()
    if args or kwargs or self.merged or (grads if off else len(active) != 1 or active[0] not in self.lora_A):
        return type(self).forward(self, x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    lora = () if off else (self.lora_A[active[0]].weight, self.lora_B[active[0]].weight, self.scaling[active[0]])
    weight = weight_of(base)
    packed_weight = getattr(self, "packed_weight", weight)
    drop = 0.0 if off else getattr(self.lora_dropout[active[0]], "p", 0.0) * self.training
    if grads or drop:
        y = LoraSum.apply(rows, weight, packed_weight, base.bias, *lora, drop)
    else:
        y = product(rows, packed_weight, base.bias)
        if lora:
            y.addmm_(rows @ lora[0].T, lora[1].T, alpha=lora[2])
    return y.view(*x.shape[:-1], y.shape[-1])


def weight_of(layer):
    """(out, in) of a linear layer, GPT-2's included."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def is_frozen_float32(layer) -> bool:
    return type(layer) in (nn.Linear, Conv1D) and not any(
        p.requires_grad or p.dtype != torch.float32 for p in layer.parameters()
    )


def is_plain_lora(layer) -> bool:
    return (
        type(layer) is LoraLinear
        and is_frozen_float32(layer.base_layer)
        and not layer.lora_variant
        and all(type(drop) in (nn.Dropout, nn.Identity) for drop in layer.lora_dropout.values())
        and not any(part.bias is not None for part in layer.lora_B.values())
    )


def use_fast_linear(model, pack: bool = False) -> None:
    """Speed up a model's plain LoRA layers in float32, and nothing else. Not for autocast.

    Args:
        pack: whether the weights of these and of a frozen output layer are held again as oneDNN likes them best, which
            pays where few rows are multiplied at a time; the base's weights must stay as they are from then on.
    """
    layers, head = [layer for layer in model.modules() if is_plain_lora(layer)], model.get_output_embeddings()
    for layer in layers:
        layer.forward = MethodType(lora_forward, layer)
    weights = {layer: weight_of(layer.base_layer).detach() for layer in layers}
    if head is not None and is_frozen_float32(head):
        weights[head] = head.weight.detach()
    if pack and ONEDNN and sum(weight.nbytes for weight in weights.values()) <= COPIES:
        for layer, weight in weights.items():
            layer.packed_weight = packed(weight)
