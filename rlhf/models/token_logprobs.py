"""Log-probabilities of tokens from the states before them, for which nothing of vocabulary size is kept.

The logits of a few states are made, read and given up again. Of a frozen head the gradient is known at once, up to a
factor: d log p(token) / d state = W[token] - sum over the vocabulary of p W. A trained head makes its logits again for
backward.
"""

from typing import NamedTuple

import torch

from rlhf.models.fast_linear import product

AT_A_TIME = 2**23  # logits, 32 MB of them


class Scored(NamedTuple):
    """Of each token: its log-probability, which alone has a gradient; the entropy, and whether it is the likeliest."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor


class TokenLogprobs(torch.autograd.Function):
    """`Scored` of tokens (n,) from states (n, hidden) by a head's weight (vocabulary, hidden) and bias or None.

    `packed` is the weight as `fast_linear.product` takes it.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, tokens, packed):
        needs_states, *trained = ctx.needs_input_grad[:3]
        found = [torch.empty(len(states), device=states.device) for _ in range(2)]
        is_top1 = torch.empty(len(states), dtype=torch.bool, device=states.device)
        slopes = torch.empty_like(states) if needs_states and not any(trained) else None
        for part in parts(states, weight):
            ids = tokens[part]
            logits = product(states[part], packed, bias).float()
            top, likeliest = logits.max(-1, keepdim=True)
            of_token = logits.gather(-1, ids[:, None])
            probabilities = logits.softmax(-1)
            total = top - probabilities.gather(-1, likeliest).log()  # logsumexp
            found[0][part] = (of_token - total)[:, 0]
            few = zip(probabilities.split(16), logits.split(16), strict=True)  # whose products stay in the cache
            found[1][part] = total[:, 0] - torch.cat([torch.linalg.vecdot(*rows) for rows in few])
            is_top1[part] = likeliest[:, 0] == ids
            if slopes is not None:
                slopes[part] = weight[ids] - product(probabilities.to(weight.dtype), weight.T)
        ctx.save_for_backward(slopes, *((states, weight, bias, tokens) if any(trained) else (None,) * 4))
        ctx.mark_non_differentiable(found[1], is_top1)
        return Scored(*found, is_top1)

    @staticmethod
    def backward(ctx, grad, *_):
        slopes, states, weight, bias, tokens = ctx.saved_tensors
        if slopes is not None:
            return slopes.mul_(grad[:, None]), None, None, None, None
        if states is None:
            return (None,) * 5
        wanted = ctx.needs_input_grad
        grad_states, grad_weight = torch.empty_like(states), torch.zeros_like(weight)
        grad_bias = torch.zeros_like(bias) if wanted[2] else None
        for part in parts(states, weight):
            logits = product(states[part], weight.detach(), bias).float()
            grad_logits = logits.softmax(-1).mul_(-grad[part, None]).to(weight.dtype)
            grad_logits[torch.arange(len(grad_logits), device=states.device), tokens[part]] += grad[part]
            grad_states[part] = product(grad_logits, weight.detach().T)
            if wanted[1]:
                grad_weight.addmm_(grad_logits.T, states[part].to(weight.dtype))
            if wanted[2]:
                grad_bias += grad_logits.sum(0)
        return grad_states if wanted[0] else None, grad_weight if wanted[1] else None, grad_bias, None, None


def parts(states, weight) -> list[slice]:
    """The states in turn, so few that their logits are not many."""
    size = max(1, AT_A_TIME // weight.shape[0])
    return [slice(start, start + size) for start in range(0, len(states), size)]


def token_logprobs(head, states, tokens, temperature: float = 1.0) -> Scored:
    """Of tokens (n,) after states (n, hidden), by an output layer whose logits are divided by the temperature."""
    if temperature != 1:  # the same, of far fewer numbers
        states = states / temperature
    bias = head.bias if head.bias is None or temperature == 1 else head.bias / temperature
    return Scored(*TokenLogprobs.apply(states, head.weight, bias, tokens, getattr(head, "packed_weight", head.weight)))
