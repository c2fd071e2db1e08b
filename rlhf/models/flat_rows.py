"""Rows of tokens through a transformer without padding: laid end to end as one long row, each attending to itself.

Padding costs what tokens cost: half of a batch of prompts and answers of mixed lengths is easily padding. Layers other
than attention work a token at a time (models with layers that do not are padded). Attention is called here row by row
on a CPU, where a matrix product takes as long as it has rows; on a GPU it is torch's attention over rows of varying
lengths, in 16 bits on cards that have it, and rows are padded elsewhere: many small kernels cost more than padding.

What a family does beside that (masks or biases of its own, attention to what follows, positions that it counts itself)
is not listed here: a model reads rows end to end if it is seen to compute the same so.
"""

from functools import wraps

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLAT = "flat_rows"
ROW_BY_ROW = {"full_attention", "sliding_attention"}  # layers that reach other tokens through attention alone


def plain(model):
    """The transformers model inside a PeftModel, its adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trunk_of(model):
    """The transformer without its head, of a causal model or a sequence classifier, with its adapters."""
    model = plain(model)
    return getattr(model, model.base_model_prefix)


def flat_attention(
    module, query, key, value, attention_mask, row_lengths=None, sliding_window=None, windows=None, **kwargs
):
    """Attention within each of the rows that lie end to end in (1, heads, tokens, width); sdpa if they do not.

    Args:
        windows: a list that takes down the windows that layers ask for.
    """
    if windows is not None:
        windows.append(sliding_window)
    if row_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    if query.device.type == "cuda":
        assert not dropout, "this attention has no dropout"
        return on_gpu(query, key, value, row_lengths, sliding_window, scaling), None
    causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    near = sliding_window is None or max(row_lengths) <= sliding_window
    whole = query.dtype == key.dtype == value.dtype == torch.float32  # autocast may have left some so
    if causal and near and whole and query.shape[-1] == value.shape[-1]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return RowAttention.apply(query, key, value, row_lengths, scaling, dropout), None
    outputs = []
    for q, k, v in zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True):
        band, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            band = q.new_ones(length, length, dtype=torch.bool).tril().triu(1 - sliding_window)[None, None]
        outputs.append(sdpa_attention_forward(module, q, k, v, band, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


class RowAttention(torch.autograd.Function):
    """Causal attention of each row to itself on a CPU: (1, heads, tokens, width) -> (1, tokens, heads, width).

    By torch's flash kernels, row after row into one tensor; its sdpa has none with dropout. There the probabilities
    are made again for backward, and a byte each is kept of what was dropped.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling, drop):
        output, kept = query.new_empty(query.transpose(1, 2).shape), []
        ctx.lengths, ctx.scaling, ctx.drop, ctx.groups = lengths, scaling, drop, query.shape[1] // key.shape[1]
        for (q, k, v), o in zip(rows_of(ctx, query, key, value), output.split(lengths, dim=1), strict=True):
            if drop:
                mask = torch.empty(q.shape[1], q.shape[2], q.shape[2], dtype=torch.bool).bernoulli_(1 - drop)
                weights = causal_softmax(q[0], k[0], scaling).mul_(mask)
                o.copy_((weights @ v[0]).mul_(1 / (1 - drop)).transpose(0, 1))
            else:
                row, mask = FORWARD(q, k, v, 0.0, True, scale=scaling)
                o.copy_(row.transpose(1, 2))
            kept.append(mask)
        ctx.save_for_backward(query, key, value, output, *kept)
        return output

    @staticmethod
    def backward(ctx, grad):
        query, key, value, output, *kept = ctx.saved_tensors
        grads, scaling, groups = [torch.empty_like(states) for states in (query, key, value)], ctx.scaling, ctx.groups
        rows = zip(rows_of(ctx, query, key, value), grad.split(ctx.lengths, dim=1), strict=True)
        wanted, start = zip(*(states.split(ctx.lengths, dim=2) for states in grads), strict=True), 0
        for ((q, k, v), g), mask, places in zip(rows, kept, wanted, strict=True):
            g, o = g.transpose(1, 2), output[:, start : start + q.shape[2]].transpose(1, 2)
            start += q.shape[2]
            if ctx.drop:
                weights = causal_softmax(q[0], k[0], scaling)
                mask = mask * (1 / (1 - ctx.drop))
                grad_v = (weights * mask).transpose(1, 2) @ g[0]
                slopes = (g[0] @ v[0].transpose(1, 2)).mul_(mask)
                slopes = slopes.sub_((slopes * weights).sum(-1, keepdim=True)).mul_(weights).mul_(scaling)
                found = (slopes @ k[0], slopes.transpose(1, 2) @ q[0], grad_v)
            else:
                found = BACKWARD(g, q, k, v, o, mask, 0.0, True, scale=scaling)
            for place, one in zip(places, found, strict=True):
                repeated = one.shape[-3] != place.shape[1]
                place.copy_(one.unflatten(-3, (-1, groups)).sum(-3) if repeated else one)
        return *grads, None, None, None


FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def rows_of(ctx, query, key, value):
    """Query, key and value of each row, with as many heads each."""
    for q, k, v in zip(*(states.split(ctx.lengths, dim=2) for states in (query, key, value)), strict=True):
        yield (q, k, v) if ctx.groups == 1 else (q, *(s.repeat_interleave(ctx.groups, dim=1) for s in (k, v)))


def causal_softmax(query, key, scaling):
    """Weights of attention, (heads, tokens, tokens)."""
    scores = torch.baddbmm(query.new_zeros(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
    return scores.masked_fill_(later, float("-inf")).softmax(-1)


def on_gpu(query, key, value, row_lengths, sliding_window, scaling):
    """The same in one call of torch's kernel, in 16 bits; (1, heads, tokens, width) -> (1, tokens, heads, width).

    Autocast does not know the kernel, and rotary positions leave queries and keys in float32 under it.
    """
    half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    ends = torch.tensor([0, *row_lengths], device=query.device).cumsum(0).to(torch.int32)
    q, k, v = (states[0].transpose(0, 1).to(half).contiguous() for states in (query, key, value))
    return varlen_attn(
        q,
        k,
        v,
        ends,
        ends,
        max(row_lengths),
        max(row_lengths),
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )[None]


AttentionInterface.register(FLAT, flat_attention)
AttentionMaskInterface.register(FLAT, sdpa_mask)


def use_flat_rows(model) -> None:
    """Have a model read rows without padding, where it computes the same so; and a faster tanh-gelu."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):  # six kernels; the same function is one in torch
                setattr(module, name, nn.GELU(approximate="tanh"))
    if (
        model.config._attn_implementation == "sdpa"
        and model._supports_attention_backend  # or attention is not the function that is registered here
        and not getattr(model.config, "alibi", False)
        and not any(isinstance(module, nn.Conv1d) for module in model.modules())
        and set(getattr(model.config.get_text_config(), "layer_types", None) or ()) <= ROW_BY_ROW
    ):
        wanted, windows = probe(model), []
        model.set_attn_implementation(FLAT)
        off = (probe(model, windows) - wanted).norm() / wanted.norm()
        told = any(windows) == slides(model.config.get_text_config())  # the rows are shorter than most windows
        if not told or not off < (1e-3 if model.dtype.itemsize == 4 else 5e-2):
            model.set_attn_implementation("sdpa")


def slides(config) -> bool:
    """Whether layers attend to a window of tokens alone: by the mask, where a family does not tell its attention."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return bool(getattr(config, "sliding_window", None)) and "sliding_attention" in kinds


@torch.no_grad()
def probe(model, windows: list | None = None):
    """The last states of two short rows, padded, or if windows are to be taken down end to end: (tokens, hidden)."""
    trunk, count = trunk_of(model), len(model.get_input_embeddings().weight)
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 12
    lengths = [min(5, most), min(12, most)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(model.device)
    ids = torch.arange(mask.numel(), device=model.device).view(mask.shape) % count
    training, half = trunk.training, model.dtype if model.dtype.itemsize < 4 else torch.bfloat16
    trunk.eval()
    with torch.autocast("cuda", half, enabled=model.device.type == "cuda"):
        if windows is None:
            states = trunk(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state[mask]
        else:
            inputs = flat_inputs(ids[mask], lengths)
            states = trunk(**inputs, windows=windows, use_cache=False).last_hidden_state[0]
    trunk.train(training)
    return states.float()


def fits_gpu(model) -> bool:
    """Whether torch's attention over rows of varying lengths can be this model's on this GPU, in 16 bits."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:  # Mamba's, which pays no attention
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    dropout = any(getattr(config, name, 0) for name in ("attn_pdrop", "attention_dropout"))  # it has none
    even = getattr(config, "v_head_dim", None) in (None, width)
    return torch.cuda.get_device_capability()[0] >= 8 and width % 8 == 0 and width <= 256 and even and not dropout


def is_flat(model) -> bool:
    return model.config._attn_implementation == FLAT


def flat_inputs(tokens: torch.Tensor, lengths: list[int]) -> dict:
    """The arguments of a transformer's forward for rows laid end to end: all their tokens, and their lengths."""
    return {
        "input_ids": tokens[None],
        "position_ids": torch.cat([torch.arange(length, device=tokens.device) for length in lengths])[None],
        # a mask of four dimensions is passed on as it is; flat_attention does not look at it
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
        "row_lengths": lengths,
    }


def read_flat(trunk) -> None:
    """Have a transformer that reads flat rows lay right-padded ones end to end itself: what it returns is padded
    again, with 0. Other calls (with a cache, with positions of their own) go through as they are.
    """
    forward = trunk.forward

    @wraps(forward)
    def flat(input_ids=None, attention_mask=None, **kwargs):
        own = kwargs.get("position_ids") is not None or kwargs.get("past_key_values") is not None
        if input_ids is None or attention_mask is None or attention_mask.dim() != 2 or own:
            return forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        mask = attention_mask.bool()
        output = forward(**kwargs | flat_inputs(input_ids[mask], mask.sum(1).tolist()))
        states = output.last_hidden_state[0]
        output.last_hidden_state = states.new_zeros(*mask.shape, states.shape[-1]).index_put((mask,), states)
        return output

    trunk.forward = flat
