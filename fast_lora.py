"""A LoRA layer's product in as few passes over memory as it takes: the same numbers as PEFT's, sooner on a CPU.

PEFT computes `base(x) + B(A(x)) * scaling` as five operations, each of which writes a tensor of the output's size or
keeps one for backward. Here the low-rank part is added into the base's output in place, forward and backward.
"""

from types import MethodType

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D


class LowRankSum(torch.autograd.Function):
    """y = x W + bias + scaling (x A^T) B^T, with W frozen; x (rows, in), W (in, out), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        y, low = product(x, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low = ctx.saved_tensors
        grad_low = grad @ b
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.T).addmm_(grad_low, a, alpha=ctx.scaling)
        if ctx.needs_input_grad[3]:
            grad_a, grad_b = (grad_low.T @ x).mul_(ctx.scaling), (grad.T @ low).mul_(ctx.scaling)
        return grad_x, None, None, grad_a, grad_b, None


def product(x, weight, bias, a, b, scaling):
    """(x W + bias + scaling (x A^T) B^T, x A^T)."""
    low = x @ a.T
    y = x @ weight if bias is None else torch.addmm(bias, x, weight)
    return y.addmm_(low, b.T, alpha=scaling), low


def forward(self, x, *args, **kwargs):
    """In place of a LoRA layer's own; whatever is not the plain case goes there."""
    name = self._active_adapter if isinstance(self._active_adapter, str) else self._active_adapter[0]
    if self._disable_adapters or self.merged or len(self.active_adapters) != 1 or name not in self.lora_A:
        return type(self).forward(self, x, *args, **kwargs)
    base, a, b = self.base_layer, self.lora_A[name].weight, self.lora_B[name].weight
    weight = base.weight if isinstance(base, Conv1D) else base.weight.T
    operands = x.reshape(-1, x.shape[-1]), weight, base.bias, a, b, self.scaling[name]
    y = LowRankSum.apply(*operands) if torch.is_grad_enabled() else product(*operands)[0]
    return y.view(*x.shape[:-1], -1)


def use_fast_lora(model) -> None:
    """Speed up a PeftModel's plain LoRA layers on a float32 base; leave all others to PEFT. Not for autocast."""
    for layer in (module for module in model.modules() if type(module) is LoraLinear):
        base = layer.base_layer
        plain = type(base) in (nn.Linear, Conv1D) and base.weight.dtype == torch.float32
        dropout = any(isinstance(drop, nn.Dropout) and drop.p for drop in layer.lora_dropout.values())
        biases = any(part.bias is not None for part in layer.lora_B.values())
        if plain and not (dropout or biases or layer.lora_variant):
            layer.forward = MethodType(forward, layer)
            if isinstance(base, Conv1D):  # laid out as nn.Linear's: a few rows times it are read a third faster
                base.weight.data = base.weight.data.T.contiguous().T
