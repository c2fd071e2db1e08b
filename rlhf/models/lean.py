"""A model inside TRL's trainers: what they ask of it, for less time and memory.

Rows are laid end to end instead of padded (flat_rows.py). On a CPU in float32 LoRA layers compute as in
fast_linear.py, and TRL's `fused_lm_head` scores the labelled tokens alone (token_logprobs.py): its own scores every
position there, padding and prompts too.
"""

from functools import wraps
from types import MethodType

import torch
from trl.trainer.utils import FusedCausalLMOutput

from rlhf.models.fast_linear import use_fast_linear
from rlhf.models.flat_rows import fits_gpu, is_flat, plain, read_flat, trunk_of, use_flat_rows
from rlhf.models.rollout import is_plain_head
from rlhf.models.token_logprobs import token_logprobs

TOLERANCE = 1e-3  # of a log-probability, where the same function is computed in another order


def use_lean(model, device, half: bool) -> None:
    """Have a model, and the adapters on it, compute the same with less.

    Args:
        half: whether it computes in 16 bits.
    """
    if device.type == "cpu" or (device.type == "cuda" and half and fits_gpu(plain(model))):
        use_flat_rows(plain(model))
        if is_flat(plain(model)):
            read_flat(trunk_of(model))
    if device.type == "cpu" and not half:
        use_fast_linear(model)
        if hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
            score_labels_alone(plain(model))


def score_labels_alone(model) -> None:
    """Have a causal model that TRL gave its fused head score the labelled tokens alone, if it gives the same.

    Not where more is asked of TRL's head: DPO's `use_weighting` wants sums over the vocabulary.
    """
    theirs = model.forward

    @wraps(type(model).forward)  # generation looks at it
    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head or kwargs.get("shift_labels") is not None or kwargs.get("output_router_logits"):
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        states = trunk_of(self)(*args, **{**kwargs, "use_cache": False}).last_hidden_state[:, :-1]
        mask, head = labels[:, 1:] != -100, self.get_output_embeddings()
        states = states[mask]
        found = token_logprobs(head, states, labels[:, 1:][mask])
        with torch.no_grad():  # the mean over the vocabulary
            mean_logits = states @ head.weight.mean(0) + (0 if head.bias is None else head.bias.mean())
        found = (*found, mean_logits)
        logprobs, entropy, is_top1, mean_logits = (
            values.new_zeros(mask.shape).masked_scatter(mask, values) for values in found
        )
        return FusedCausalLMOutput(
            log_probs=logprobs, entropy=entropy, is_top1=is_top1, mean_logits=mean_logits, label_mask=mask
        )

    if not is_plain_head(model):
        return
    ids = torch.arange(8)[None] % len(model.get_input_embeddings().weight)
    training, asked = model.training, {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    model.eval()
    with torch.no_grad():
        wanted, given = theirs(**asked), forward(model, **asked)
    same = {*wanted} - {"loss"} <= {*given} and torch.allclose(wanted.log_probs, given.log_probs, atol=TOLERANCE)
    model.train(training)
    if same:  # or the model does more with its logits than the output layer
        model.forward = MethodType(forward, model)
