"""The mathematics of PPO for language models: rewards, advantages, the two clipped losses, the KL controller.

Schulman et al., arXiv 1707.06347; for language models Ziegler et al., arXiv 1909.08593, and Huang et al., arXiv
2403.17031. Tensors of answers are right-padded, (rows, response tokens); `mask` is 1.0 on an answer's tokens, EOS
included. Whatever is "masked" here is masked by length, never by token id.
"""

import torch


def whiten(values, mask, shift_mean: bool = True, reduce=lambda sums: sums):
    """Values scaled to unit variance over the masked entries (and to mean 0 with `shift_mean`), 0 elsewhere.

    Args:
        reduce: sums a tensor over all processes, so that the statistics are those of the whole batch.
    """
    count, total = reduce(torch.stack([mask.sum(), (values * mask).sum()]))
    mean = total / count
    variance = reduce(((values - mean) ** 2 * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def kl_per_token(logprobs, ref_logprobs, estimator: str):
    """Estimates of KL(policy || reference) from the sampled tokens: k1 or k3 of joschu.net/blog/kl-approx.html."""
    logratio = ref_logprobs - logprobs
    return -logratio if estimator == "k1" else torch.expm1(logratio) - logratio


def token_rewards(scores, kl, mask, kl_coef: float):
    """A reward for each token: the KL penalty, and on an answer's last token also its score.

    Args:
        scores: (rows,), one for each answer.
        kl, mask: (rows, tokens).
    """
    rewards = -kl_coef * kl * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards


def advantages_and_returns(rewards, values, mask, gamma: float, lam: float):
    """Generalized advantage estimation (arXiv 1506.02438, equation 16); after an answer's last token the value is 0.

    Args:
        rewards, values, mask: (rows, tokens); values[:, t] is the value of the state before token t.
    Returns:
        advantages and returns = advantages + values, both (rows, tokens).
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    following, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t], next_value = following, values[:, t]
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages, cliprange: float):
    """The clipped surrogate, a token at a time (arXiv 1707.06347, equation 7): (losses, ratio, clipped), unmasked."""
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), ratio, clipped > unclipped


def value_loss(values, old_values, returns, cliprange_value: float):
    """Half the squared error of the new value or of the value clipped near the old one, whichever is larger."""
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def adapted_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, episodes: int) -> float:
    """The KL coefficient that steers the KL of an answer (nats) to a target (arXiv 1909.08593, section 2.2).

    It changes by at most 20% in the `horizon` episodes that it takes to correct an error.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
