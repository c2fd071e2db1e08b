"""The mathematics of PPO by hand, and the trainer's promises: `pytest tests/test_ppo_trainer.py`."""

import math

from modeling import load_frozen_policy, load_policy, load_reward_model, load_tokenizer
from ppo_algorithm import (
    advantages_and_returns,
    kl_per_token,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from ppo_trainer import BatchSampler, PPOConfig, PPOTrainer
from ppo_training import make_parser
from rewards import load_reward
from rollout import generate, read_answers, score
from user_error import UserError

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model


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


def test_batches_repeat_and_use_every_prompt_before_any_twice():
    order = list(BatchSampler(num_prompts=6, batch_size=3, num_batches=4, repeats=2, seed=1))
    batches = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert batches[0] == batches[1] and batches[2] == batches[3]
    assert sorted(batches[0] + batches[2]) == list(range(6))
    assert order == list(BatchSampler(6, 3, 4, 2, seed=1)) != list(BatchSampler(6, 3, 4, 2, seed=2))


@pytest.fixture(scope="module")
def policy(saved):
    tokenizer = load_tokenizer(saved["sft"])
    return load_frozen_policy(saved["sft"], tokenizer), tokenizer


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def test_an_answer_depends_neither_on_its_neighbours_nor_on_its_padding(policy):
    model, tokenizer = policy
    noise = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    options = {"stop_ids": set(range(0, 400, 7)), "pad_id": tokenizer.pad_token_id, "temperature": 1.0}
    together, logprobs, _ = generate(model, PROMPTS, noise, **options)
    alone = [generate(model, [p], noise[i : i + 1], **options)[0][0] for i, p in enumerate(PROMPTS)]
    assert together == alone
    assert len({len(a) for a in together}) > 1  # so that rows did leave the batch
    for answer in together:
        assert not set(answer[:-1]) & options["stop_ids"]


def test_sampling_draws_the_quantile_of_the_models_own_distribution(policy):
    model, tokenizer = policy
    with torch.no_grad():
        cumulative = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].div(0.7).softmax(-1).cumsum(-1)
    for quantile in (0.0, 0.3, 0.999):
        noise = torch.full((1, 1), quantile)
        options = {"stop_ids": set(), "pad_id": tokenizer.pad_token_id, "temperature": 0.7}
        [[token]], _, _ = generate(model, PROMPTS[:1], noise, **options)
        assert cumulative[token] > quantile >= (cumulative[token - 1] if token else 0)


def test_answers_are_read_as_a_plain_forward_pass_would(policy):
    model, tokenizer = policy
    answers = [[20, 21], [22], [23, 24, 25]]
    logprobs, entropy, mask, _ = read_answers(model, PROMPTS, answers, tokenizer.pad_token_id, 0.5)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True)):
        with torch.no_grad():
            every = (model(input_ids=torch.tensor([prompt + answer])).logits[0] / 0.5).log_softmax(-1)
        before = every[len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs[row, : len(answer)], before[range(len(answer)), answer])
        torch.testing.assert_close(entropy[row, : len(answer)], -(before.exp() * before).sum(-1))
        assert mask[row].sum() == len(answer) and not logprobs[row, len(answer) :].any()


def test_scores_do_not_depend_on_padding_and_are_read_at_the_eos(saved, policy):
    _, tokenizer = policy
    reward_model = load_reward_model(saved["reward"], tokenizer)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = [[5, 6, eos], [7, eos], [8, 9, 10, 11, eos]]
    together = score(reward_model, rows, pad)
    alone = torch.cat([score(reward_model, [row], pad) for row in rows])
    torch.testing.assert_close(together, alone)
    with torch.no_grad():  # what any other library computes with the same folder, on either padding side
        for side in ("right", "left"):
            tokenizer.padding_side = side
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            theirs = reward_model(**batch, position_ids=positions).logits[:, 0]
            torch.testing.assert_close(theirs, together)
    tokenizer.padding_side = "right"
    assert not torch.allclose(score(reward_model, [[5, 6]], pad), together[:1])


def row(i):
    return {
        "prompt_ids": [3 + i, 40, 50 + i],
        "prompt": [{"role": "user", "content": f"Who mends net {i}?"}],
        "reference": "The three sisters do.",
    }


def make_trainer(saved, folder, prompts=16, **flags):
    flags = {
        "model_name_or_path": saved["sft"],
        "reward_model_name_or_path": saved["reward"],
        "output_dir": folder,
        "response_length": 8,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "eval_strategy": "no",
        "eval_on_start": False,
        "learning_rate": 1e-3,
        **flags,
    }
    script_args, args, model_args = make_parser().parse_args_and_config(
        [p for k, v in flags.items() for p in (f"--{k}", str(v))]
    )
    tokenizer = load_tokenizer(saved["sft"])
    policy, peft_config = load_policy(model_args, tokenizer)
    if peft_config:
        policy = get_peft_model(policy, peft_config)
    return PPOTrainer(
        model=policy,
        args=args,
        reward_model=load_reward(script_args.reward_model_name_or_path, tokenizer, model_args, policy),
        train_dataset=Dataset.from_list([row(i) for i in range(prompts)]),
        eval_dataset={"held": Dataset.from_list([row(i) for i in range(100, 108)])},
        processing_class=tokenizer,
    )


def trained_state(trainer):
    return {k: v.clone() for k, v in trainer.model.named_parameters() if v.requires_grad}


def test_each_mini_batch_is_one_optimizer_step_and_the_first_ratio_is_one(saved, tmp_path):
    trainer = make_trainer(saved, tmp_path, num_mini_batches=4, num_ppo_epochs=3, logging_steps=1)
    before = trained_state(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 * 4 * 3
    first = trainer.state.log_history[0]
    assert abs(first["objective/kl"]) < 1e-4 and first["episode"] == 8
    assert abs(first["val/ratio"] - 1) < 0.1 and first["val/num_eos_tokens"] == first["val/eos_rate"] * 8
    moved = [name for name, value in trained_state(trainer).items() if not torch.equal(value, before[name])]
    assert set(moved) == set(before) and all("default" in name or "value_head" in name for name in moved)


def test_the_micro_batch_size_is_memory_only(saved, tmp_path):
    states = []
    for micro in (1, 4, 8):
        trainer = make_trainer(
            saved,
            tmp_path,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro,
            num_ppo_epochs=2,
        )
        trainer.train()
        states.append(trained_state(trainer))
    for name, value in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(value, other[name], atol=2e-5, rtol=1e-3, msg=name)


def test_mini_batches_are_disjoint_and_the_same_however_many_processes_share_the_batch(saved, tmp_path):
    trainer = make_trainer(saved, tmp_path, num_mini_batches=2)
    parts = [trainer.mini_batch_rows(3, 1, m).tolist() for m in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(8)) and len(parts[0]) == 4
    trainer.ppo.local_batch_size = 4  # as the first of two processes
    assert trainer.mini_batch_rows(3, 1, 0).tolist() == [row for row in parts[0] if row < 4]


def test_a_run_resumed_from_a_checkpoint_ends_with_the_same_weights(saved, tmp_path):
    whole = make_trainer(saved, tmp_path / "whole", max_steps=4, save_steps=2, num_mini_batches=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-16"
    assert (checkpoint / "value_head.safetensors").exists() and not (checkpoint / "ref").exists()
    again = make_trainer(saved, tmp_path / "again", max_steps=4, save_steps=2, num_mini_batches=2)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, value in trained_state(whole).items():
        assert torch.equal(value, trained_state(again)[name]), name


def test_the_policy_learns_what_is_rewarded(saved, tmp_path, monkeypatch):
    """The reward is the share of even tokens: about a half at first, and PPO has to find out."""
    flags = {"max_steps": 20, "per_device_train_batch_size": 64, "learning_rate": 1e-2, "kl_coef": 0.0}
    trainer = make_trainer(saved, tmp_path, prompts=64, **flags)
    even = lambda rows, *_: torch.tensor([sum(t % 2 == 0 for t in r[3:]) / 8 for r in rows])  # noqa: E731
    monkeypatch.setattr(trainer.reward, "score_tokens", even)
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    assert 0.4 < scores[0] < 0.6 and scores[-1] > 0.7, scores


def test_a_prompt_set_smaller_than_a_batch_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="4 prompts are fewer than one batch of 8"):
        make_trainer(saved, tmp_path, prompts=4)


def test_mini_batches_must_divide_the_batch():
    with pytest.raises(ValueError, match="num_mini_batches 3 does not divide"):
        PPOConfig(output_dir="x", use_cpu=True, per_device_train_batch_size=8, num_mini_batches=3)
