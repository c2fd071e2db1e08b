"""Rows of tokens through a transformer without padding: laid end to end as one long row, each attending to itself.

Padding costs what tokens cost: half of a batch of prompts and answers of mixed lengths is easily padding. Layers other
than attention work a token at a time (models with layers that do not are padded); attention is called here row by row.
Fast on a CPU, where a matrix product takes as long as it has rows; on a GPU many small kernels cost more than the
padding, so rows are padded there.
"""

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLAT = "flat_rows"
ROW_BY_ROW = {"full_attention", "sliding_attention"}  # layers that reach other tokens through attention alone


def flat_attention(module, query, key, value, attention_mask, row_lengths=None, sliding_window=None, **kwargs):
    """Attention within each of the rows that lie end to end in (1, heads, tokens, width); sdpa if they do not."""
    if row_lengths is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, sliding_window=sliding_window, **kwargs
        )
    outputs = []
    for q, k, v in zip(*(states.split(row_lengths, dim=2) for states in (query, key, value)), strict=True):
        band, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            band = q.new_ones(length, length, dtype=torch.bool).tril().triu(1 - sliding_window)[None, None]
        outputs.append(sdpa_attention_forward(module, q, k, v, band, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


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
        model.set_attn_implementation(FLAT)


def is_flat(model) -> bool:
    return model.config._attn_implementation == FLAT


def flat_inputs(rows: list[list[int]], device) -> dict:
    """The arguments of a transformer's forward for rows laid end to end."""
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]], device=device),
        "position_ids": torch.cat([torch.arange(len(row), device=device) for row in rows])[None],
        # a mask of four dimensions is passed on as it is; flat_attention does not look at it
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "row_lengths": [len(row) for row in rows],
    }
