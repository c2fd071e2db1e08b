"""The PPO trainer's promises, and those of what it trains with: `pytest tests/ppo/test_trainer.py`."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, get_peft_model
from torch.nn.utils.rnn import pad_sequence

import merge_peft_adapter
from ppo_training import make_parser
from rlhf.models.loading import load_policy, load_reward_model, load_tokenizer
from rlhf.models.rewards import load_reward
from rlhf.ppo.algorithm import advantages_and_returns, kl_per_token, token_rewards, whiten
from rlhf.ppo.batches import BatchSampler, mini_batch_rows
from rlhf.ppo.evaluation import Collapse
from rlhf.ppo.trainer import PPOTrainer
from rlhf.user_error import UserError


def test_batches_repeat_and_use_every_prompt_before_any_twice():
    order = list(BatchSampler(num_prompts=6, batch_size=3, num_batches=4, repeats=2, seed=1))
    batches = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert batches[0] == batches[1] and batches[2] == batches[3]
    assert sorted(batches[0] + batches[2]) == list(range(6))
    assert order == list(BatchSampler(6, 3, 4, 2, seed=1)) != list(BatchSampler(6, 3, 4, 2, seed=2))


def row(i):
    return {
        "prompt_ids": [3 + i, 40, 50 + i],
        "prompt": [{"role": "user", "content": f"Who mends net {i}?"}],
        "reference": "The three sisters do.",
    }


def make_trainer(saved, folder, prompts=16, reference="The three sisters do.", **flags):
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
    policy, peft_config = load_policy(model_args, tokenizer, args.seed)
    if peft_config:
        policy = get_peft_model(policy, peft_config)
    return PPOTrainer(
        model=policy,
        args=args,
        reward_model=load_reward(script_args.reward_model_name_or_path, tokenizer, model_args, policy),
        train_dataset=Dataset.from_list([row(i) | {"reference": reference} for i in range(prompts)]),
        eval_dataset={"held": Dataset.from_list([row(i) for i in range(100, 108)])},
        processing_class=tokenizer,
    )


def trained_state(trainer):
    return {k: v.clone() for k, v in trainer.model.named_parameters() if v.requires_grad}


def test_fsdp_is_refused_before_anything_is_sampled(saved, tmp_path, monkeypatch):
    real = PPOTrainer.create_accelerator_and_postprocess

    def sharded(self):
        real(self)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(PPOTrainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(UserError, match="whole weights on each device"):
        make_trainer(saved, tmp_path / "ppo")


def test_each_mini_batch_is_one_optimizer_step_and_the_first_ratio_is_one(saved, tmp_path):
    trainer = make_trainer(saved, tmp_path, num_mini_batches=4, num_ppo_epochs=3, logging_steps=1)
    before = trained_state(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 * 4 * 3
    first = trainer.state.log_history[0]
    assert abs(first["objective/kl"]) < 1e-4 and first["episode"] == 8
    assert abs(first["val/ratio"] - 1) < 0.1 and first["val/num_eos_tokens"] == first["val/eos_rate"] * 8
    moved = [name for name, value in trained_state(trainer).items() if not torch.equal(value, before[name])]
    assert set(moved) == set(before) and {"default", "value"} == {
        name.split(".")[-2].removesuffix("_head") for name in moved
    }


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
    parts = [mini_batch_rows(trainer.ppo, 0, 3, 1, m).tolist() for m in range(2)]
    assert sorted(parts[0] + parts[1]) == list(range(8)) and len(parts[0]) == 4
    trainer.ppo.local_batch_size = 4  # as the first of two processes
    assert mini_batch_rows(trainer.ppo, 0, 3, 1, 0).tolist() == [row for row in parts[0] if row < 4]


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
    monkeypatch.setattr(trainer.experience.reward, "score_tokens", even)
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    assert 0.4 < scores[0] < 0.6 and scores[-1] > 0.7, scores


def test_gradients_are_those_of_four_models_of_their_own(saved, tmp_path, subtests):
    """Policy, reference, reward and value as separately loaded full copies, PEFT's own LoRA, a row at a time."""
    for value_adapter in (False, True):
        for checkpointing in (False, True):
            with subtests.test(value_adapter=value_adapter, checkpointing=checkpointing):
                trainer = make_trainer(saved, tmp_path, value_adapter=value_adapter)
                assert "reward" in trainer.model.policy.peft_config  # all on one base
                if checkpointing:
                    trainer.model.activation_checkpointing_enable()
                rows = [trainer.train_dataset[i] for i in range(8)]
                trainer.rollout = batch = trainer.roll_out(rows, update=0)
                trainer.model.train()
                trainer.compute_loss(trainer.model, trainer.micro_batch(0, 0)).backward()
                expected = gradients_of_four_models(saved, trainer, batch, value_adapter)
                ours = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
                assert ours.keys() == expected.keys() and all(g.any() for g in expected.values())
                for name, gradient in expected.items():
                    torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


def gradients_of_four_models(saved, trainer, batch, value_adapter) -> dict:
    ppo = trainer.ppo
    policy = AutoPeftModelForCausalLM.from_pretrained(saved["sft"], is_trainable=True)
    reference = AutoPeftModelForCausalLM.from_pretrained(saved["sft"])
    reward = load_reward_model(saved["reward"], load_tokenizer(saved["reward"]))
    critic = AutoPeftModelForSequenceClassification.from_pretrained(saved["reward"], num_labels=1, is_trainable=True)
    policy.eval(), critic.eval()  # without dropout
    head = reward.get_base_model().score.weight.detach().clone().requires_grad_()

    def read(model, ids):
        logprobs = (model(input_ids=ids).logits[0, :-1] / ppo.temperature).log_softmax(-1)
        return logprobs.gather(-1, ids[0, 1:, None])[:, 0]

    parts, scores = [], []
    for prompt, answer in zip(batch["prompts"], batch["answers"], strict=True):
        ids, start = torch.tensor([prompt + answer]), len(prompt) - 1
        trunk = critic if value_adapter else policy
        values = (trunk(input_ids=ids, output_hidden_states=True).hidden_states[-1][0] @ head.T)[:, 0]
        with torch.no_grad():
            ref_logprobs = read(reference, ids)[start:]
            scores.append(reward(input_ids=ids).logits[0, 0])
        parts.append((read(policy, ids)[start:], ref_logprobs, values[start:-1], torch.ones(len(answer))))
    logprobs, ref_logprobs, values, mask = (pad_sequence(p, batch_first=True) for p in zip(*parts, strict=True))
    torch.testing.assert_close(batch["logprobs"], logprobs.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch["values"], values.detach(), atol=1e-5, rtol=1e-4)
    rewards = token_rewards(
        torch.stack(scores), kl_per_token(logprobs.detach(), ref_logprobs, "k1"), mask, ppo.kl_coef
    )
    advantages, returns = advantages_and_returns(rewards, values.detach(), mask, ppo.gamma, ppo.lam)
    ratio = (logprobs - logprobs.detach()).exp()
    loss = -whiten(advantages, mask) * ratio + ppo.vf_coef * 0.5 * (values - returns) ** 2
    ((loss * mask).sum() / mask.sum()).backward()
    gradients = {f"policy.{name}": p.grad for name, p in policy.named_parameters() if p.requires_grad}
    if value_adapter:
        for name, parameter in critic.named_parameters():
            if "lora_" in name:
                gradients[f"policy.{name}".replace(".default.", ".value.")] = parameter.grad
    return gradients | {"value_head.weight": head.grad}


def test_a_reward_adapter_on_the_policys_base_scores_as_on_its_own(saved, tmp_path):
    trainer = make_trainer(saved, tmp_path)
    rows = [[5, 6, 0], [7, 8, 9, 10, 0], [11, 0]]
    alone = load_reward(saved["reward"], trainer.processing_class)
    torch.testing.assert_close(trainer.experience.reward.score_tokens(rows), alone.score_tokens(rows))
    assert trainer.experience.reward.adapter == "reward" and alone.adapter is None
    before = trained_state(trainer)
    assert not any(".reward." in name or ".ref." in name for name in before)
    trainer.train()
    torch.testing.assert_close(trainer.experience.reward.score_tokens(rows), alone.score_tokens(rows))


def test_full_training_and_a_critic_of_its_own_are_saved_and_resumed(saved, tmp_path):
    for name, flags in (("full", {"use_peft": False}), ("critic", {}), ("head", {"value_adapter": False})):
        flags |= {"max_steps": 2, "save_steps": 1, "adaptive_kl_target": 0.1, "adaptive_kl_horizon": 20}
        flags |= {"model_name_or_path": merged(saved["sft"], tmp_path / "sft")} if name == "full" else {}
        whole = make_trainer(saved, tmp_path / name, **flags)
        whole.train()
        again = make_trainer(saved, tmp_path / f"{name}_again", **flags)
        again.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-4"))
        state = trained_state(whole)
        assert all(torch.equal(value, trained_state(again)[key]) for key, value in state.items())
        assert whole.kl_coef == again.kl_coef != whole.ppo.kl_coef
        assert any(".value." in key for key in state) == (name == "critic")


def merged(adapter, folder) -> str:
    if not folder.exists():
        merge_peft_adapter.main(
            merge_peft_adapter.make_parser().parse_args(
                ["--adapter_model_name", adapter, "--output_name", str(folder)]
            )
        )
    return str(folder)


def test_the_critic_alone_is_trained_while_it_warms_up(saved, tmp_path):
    flags = {"value_warmup_updates": 1, "value_learning_rate": 0.1, "weight_decay": 0.5}
    trainer = make_trainer(saved, tmp_path, max_steps=1, **flags)
    before = trained_state(trainer)
    trainer.train()
    moved = {name for name, value in trained_state(trainer).items() if not torch.equal(value, before[name])}
    assert moved == trainer.model.value_parameters().keys()


@pytest.mark.parametrize(
    ("flags", "adapter", "head"),
    [({}, 1e-3, 1e-2), ({"value_adapter": False}, None, 1e-2), ({"value_learning_rate": 0.1}, 0.1, 0.1)],
)
def test_a_critics_head_learns_at_ten_times_the_policys_rate(saved, tmp_path, flags, adapter, head):
    trainer = make_trainer(saved, tmp_path, **flags)
    critic = {id(parameter): name for name, parameter in trainer.model.value_parameters().items()}
    rates = [(critic.get(id(p), ""), g["lr"]) for g in trainer.create_optimizer().param_groups for p in g["params"]]
    assert len(rates) == len(trained_state(trainer)), "each parameter once"
    assert {rate for name, rate in rates if name == "value_head.weight"} == {head}
    assert {rate for name, rate in rates if ".value." in name} == {adapter} - {None}
    assert {rate for name, rate in rates if not name} == {1e-3}


@pytest.mark.parametrize(
    "flags",
    [
        {"use_dora": True},
        {"lora_modules_to_save": "lm_head"},
        {"lora_modules_to_save": "wte"},
        {"lora_target_modules": "c_attn,lm_head"},
    ],
)
def test_a_critic_trains_what_has_a_gradient_whatever_the_policys_lora_is(saved, base, tmp_path, flags):
    """Weights without one would stop a run on several processes."""
    (tmp_path / "rewards.py").write_text(SHORT)
    flags |= {"model_name_or_path": base, "reward_model_name_or_path": f"{tmp_path}/rewards.py:short"}
    trainer = make_trainer(saved, tmp_path, **flags)
    trainer.rollout = trainer.roll_out([trainer.train_dataset[i] for i in range(8)], update=0)
    trainer.compute_loss(trainer.model, trainer.micro_batch(0, 0)).backward()
    critic = trainer.model.value_parameters()
    assert len(critic) > 1 and all(p.grad is not None for p in critic.values())
    assert not any(name.endswith("modules_to_save.value.weight") for name in critic)


@pytest.mark.parametrize("flags", [{}, {"value_adapter": False}])
def test_gradient_checkpointing_changes_nothing(saved, tmp_path, flags):
    logs = []
    for checkpointing in (False, True):
        trainer = make_trainer(saved, tmp_path, gradient_checkpointing=checkpointing, **flags)
        assert trainer.train().global_step == 8
        assert trainer.model.policy.is_activation_checkpointing == checkpointing
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history[:-1]])
    torch.testing.assert_close(torch.tensor(logs[0]), torch.tensor(logs[1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", [{"bf16": True}, {"bf16": True, "value_adapter": False}, {}])
def test_answers_are_sampled_and_read_in_the_precision_of_training(saved, tmp_path, flags, monkeypatch):
    """With `--bf16`, and with `accelerate launch --mixed_precision bf16` alone; or the ratio would start off 1."""
    if not flags:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    trainer = make_trainer(saved, tmp_path, max_steps=1, num_ppo_epochs=1, temperature=0.1, **flags)
    trainer.train()
    assert not trainer.experience.exact
    first = trainer.state.log_history[0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-3) and first["policy/approxkl_avg"] < 1e-6


def test_a_log_line_covers_updates_before_a_resume_too(saved, tmp_path):
    flags = {"max_steps": 2, "logging_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole, resumed = [], []
    for logged, checkpoint in ((whole, None), (resumed, str(tmp_path / "checkpoint-4"))):
        trainer = make_trainer(saved, tmp_path, **flags)
        trainer.train(resume_from_checkpoint=checkpoint)
        logged += [v for k, v in trainer.state.log_history[0].items() if "/" in k]
    assert whole == resumed


def test_warmup_counts_updates_and_data_seed_orders_prompts(saved, tmp_path):
    trainer = make_trainer(saved, tmp_path, max_steps=4, warmup_steps=2, lr_scheduler_type="constant_with_warmup")
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([3 / 8 * 1e-3, 7 / 8 * 1e-3, 1e-3, 1e-3])  # of each update's last step
    orders = [
        [row["prompt_ids"] for batch in make_trainer(saved, tmp_path, **flags).get_train_dataloader() for row in batch]
        for flags in ({}, {"data_seed": 42}, {"data_seed": 1})
    ]
    assert orders[0] == orders[1] != orders[2]


def test_an_update_stops_where_the_policy_has_moved_too_far(saved, tmp_path):
    """With a bound that every step breaks only the first mini-batch, where nothing has moved, makes a step."""
    flags = {"num_mini_batches": 4, "num_ppo_epochs": 3, "max_steps": 1}
    trainer = make_trainer(saved, tmp_path, target_kl=1e-12, **flags)
    trainer.train()
    steps = trainer.optimizer.state[trainer.model.value_head.weight]["step"]
    assert steps == 1 and trainer.state.global_step == 12
    assert trainer.state.log_history[0]["policy/approxkl_avg"] > 0


def test_entropy_is_rewarded_where_asked(saved, tmp_path):
    entropies = []
    for coef in (0.0, 1.0):
        trainer = make_trainer(saved, tmp_path, entropy_coef=coef, max_steps=8, learning_rate=1e-2)
        trainer.train()
        entropies.append(trainer.state.log_history[-2]["policy/entropy_avg"])
    assert entropies[1] > entropies[0] + 0.05, entropies


def test_scores_are_scaled_clipped_and_compared_with_the_datas_answers(saved, tmp_path):
    rows = [row(i) for i in range(3)]
    sampled = {"prompts": [r["prompt_ids"] for r in rows], "answers": [[60, 0], [61, 62, 0], [63]]}
    sampled["ended"] = torch.tensor([True, True, False])
    plain = make_trainer(saved, tmp_path).experience.scores(rows, sampled)
    mean, std = (getattr(make_trainer(saved, tmp_path).experience.reward, name) for name in ("mean", "std"))
    scaled = make_trainer(saved, tmp_path, use_score_norm=True).experience.scores(rows, sampled)
    torch.testing.assert_close(scaled, (plain - mean) / std)
    clip = scaled.abs().min().item() / 2
    clipped = make_trainer(saved, tmp_path, use_score_norm=True, score_clip=clip).experience.scores(rows, sampled)
    torch.testing.assert_close(clipped, scaled.sign() * clip)
    trainer = make_trainer(saved, tmp_path, subtract_reference_score=True)
    theirs = trainer.experience.reward([r["prompt"] for r in rows], [r["reference"] for r in rows], [True] * 3)
    torch.testing.assert_close(trainer.experience.scores(rows, sampled), plain - theirs)


SHORT = """
def short(prompts, completions, reference, **columns):
    assert prompts[0][-1]["role"] == "user" and reference[0]
    return [-float(len(completion[0]["content"])) for completion in completions]
"""


def test_a_function_that_prefers_short_answers_shortens_them(saved, tmp_path):
    (tmp_path / "rewards.py").write_text(SHORT)
    trainer = make_trainer(
        saved,
        tmp_path / "run",
        prompts=64,
        reward_model_name_or_path=f"{tmp_path}/rewards.py:short",
        **{"max_steps": 25, "per_device_train_batch_size": 64, "learning_rate": 1e-2, "kl_coef": 0.0},
        stop_token_id=60,
        temperature=1.0,
    )
    trainer.train()
    lengths = [entry["val/mean_length"] for entry in trainer.state.log_history if "val/mean_length" in entry]
    assert lengths[-1] < 0.7 * lengths[0], lengths


def test_held_out_answers_start_level_with_the_starting_policy(saved, tmp_path):
    flags = {"eval_strategy": "steps", "num_sample_generations": 2, "max_steps": 3, "eval_on_start": True}
    trainer = make_trainer(saved, tmp_path, **flags)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_held_scores" in entry]
    assert [entry["step"] for entry in logged] == [0, 8, 12]  # half-way, rounded up, and the end; 4 steps an update
    assert logged[0]["eval_held_win_rate"] == 0.5 and abs(logged[0]["eval_held_kl"]) < 1e-4
    assert logged[-1]["eval_held_kl"] != logged[0]["eval_held_kl"]
    samples = [json.loads(line) for line in (tmp_path / "samples" / "update_000003.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    wins = [(s["score"] > s["starting_score"]) + 0.5 * (s["score"] == s["starting_score"]) for s in samples]
    assert sum(wins) / 8 == logged[-1]["eval_held_win_rate"]


def test_a_policy_that_says_nothing_is_refused(saved, tmp_path):
    trainer = make_trainer(saved, tmp_path)
    trainer.experience.stop_ids = set(range(400))
    with pytest.raises(UserError, match="ends every answer of the first batch at once"):
        trainer.train()


def test_scores_are_compared_with_the_datas_answers_only_where_all_rows_have_one(saved, tmp_path):
    with pytest.raises(UserError, match="not all prompts come with an answer"):
        make_trainer(saved, tmp_path, subtract_reference_score=True, reference="")


def test_a_collapsed_policy_is_said_once(capsys):
    watch, state = Collapse(), SimpleNamespace(is_world_process_zero=True)
    for kl in [300.0] * 9 + [5.0] + [300.0] * 30:
        watch.on_log(None, state, None, logs={"objective/kl": kl, "policy/entropy_avg": 1.0})
    assert capsys.readouterr().out.count("the policy has collapsed (kl 300): stop, raise --kl_coef") == 1
