"""The mathematics of PPO, worked out by hand: `pytest tests/ppo/test_algorithm.py`."""

import math

import torch

from rlhf.ppo.algorithm import (
    adapted_kl_coef,
    advantages_and_returns,
    kl_per_token,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


def close(tensor, expected, **kwargs):
    torch.testing.assert_close(tensor, torch.tensor(expected), **kwargs)


def test_undiscounted_advantages_are_reward_to_come_minus_value():
    """gamma = lam = 1, rewards 0 0 1, values .5 .25 .75: the return is 1 everywhere, advantages .5 .75 .25.

    The second row ends after two tokens: what stands in the padding must not matter.
    """
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 0.75], [1.0, 1.0, 99.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=1.0, lam=1.0)
    close(advantages, [[0.5, 0.75, 0.25], [1.0, 1.0, 0.0]])
    close(returns, [[1.0, 1.0, 1.0], [2.0, 2.0, 0.0]])


def test_gae_discounts_by_gamma_times_lambda():
    """gamma = .5, lam = .5, rewards 1 2, values 3 4. delta_2 = 2 - 4 = -2; delta_1 = 1 + .5*4 - 3 = 0.
    A_2 = -2; A_1 = 0 + .25 * -2 = -.5."""
    advantages, returns = advantages_and_returns(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.ones(1, 2), gamma=0.5, lam=0.5
    )
    close(advantages, [[-0.5, -2.0]])
    close(returns, [[2.5, 2.0]])


def test_the_score_lands_on_the_last_real_token():
    """kl_coef .1: each token costs a tenth of its KL; row 1 ends at its second token, where its score 5 is added."""
    kl = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    close(token_rewards(torch.tensor([1.0, 5.0]), kl, mask, 0.1), [[-0.1, -0.2, 0.7], [-0.1, 4.8, 0.0]])


def test_kl_estimators():
    """logprob -1, reference -2: log ratio r = -1; k1 = 1; k3 = e^-1 - 1 + 1 = e^-1. Equal policies: 0."""
    one, two = torch.tensor([-1.0]), torch.tensor([-2.0])
    close(kl_per_token(one, two, "k1"), [1.0])
    close(kl_per_token(one, two, "k3"), [math.exp(-1)])
    close(kl_per_token(one, one, "k3"), [0.0])


def test_whitening_ignores_the_padding():
    """1 and 3 have mean 2, unbiased variance 2: they become -+1/sqrt 2; without the shift the mean is added back."""
    values, mask = torch.tensor([[1.0, 3.0, 77.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    half = 1 / math.sqrt(2)
    close(whiten(values, mask), [[-half, half, 0.0]])
    close(whiten(values, mask, shift_mean=False), [[2 - half, 2 + half, 0.0]])


def test_policy_loss_is_clipped_only_where_that_is_worse():
    """Ratio 1.5, cliprange .2: advantage +1 gives -1.2 (clipped), advantage -1 gives 1.5 (the penalty stays)."""
    ratio = torch.log(torch.tensor([1.5, 1.5]))
    losses, _, clipped = policy_loss(ratio, torch.zeros(2), torch.tensor([1.0, -1.0]), cliprange=0.2)
    close(losses, [-1.2, 1.5])
    assert clipped.tolist() == [True, False]


def test_value_loss_takes_the_worse_of_clipped_and_not():
    """Old value 0, return 1, range .2. New value 1: error 0, but clipped to .2 it is .8^2: loss .32. New value -1:
    unclipped error 4 is the worse: loss 2."""
    losses, clipped = value_loss(torch.tensor([1.0, -1.0]), torch.zeros(2), torch.ones(2), cliprange_value=0.2)
    close(losses, [0.32, 2.0])
    assert clipped.tolist() == [True, False]


def test_the_kl_coefficient_follows_the_kl_within_a_fifth():
    """Horizon 100, 10 episodes. KL 6.6, target 6: error .1, coefficient x 1.01. KL 60: error clipped to .2, x 1.02."""
    assert math.isclose(adapted_kl_coef(0.5, 6.6, 6, 100, 10), 0.505)
    assert math.isclose(adapted_kl_coef(0.5, 60, 6, 100, 10), 0.51)
    assert math.isclose(adapted_kl_coef(0.5, 0, 6, 100, 10), 0.49)
