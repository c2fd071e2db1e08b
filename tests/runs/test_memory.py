"""The memory that a dry run tells is the memory that the run takes: `pytest tests/runs/test_memory.py`."""

import gc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import MambaConfig, MambaForCausalLM, Trainer, TrainingArguments

from rlhf.models.flat_rows import fits_gpu
from rlhf.runs import measured_memory, memory, record
from rlhf.runs.log import read_log
from tests.conftest import run_script
from tests.runs.test_command_line import parse

STAGES = {"sft": "sft_training", "reward": "reward_modeling", "dpo": "dpo_training", "ppo": "ppo_training"}


def flags_of(stage, saved, base, data, folder) -> dict:
    """Those of the fixture `saved`."""
    flags = {"model_name_or_path": base if stage == "sft" else saved["sft"], "dataset_names": data}
    flags |= {"reward_model_name_or_path": saved["reward"], "response_length": 8} if stage == "ppo" else {}
    return flags | {"output_dir": folder, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, 4 * 100 + 16 * 3),  # LoRA: 4P + 16L
        ({"processes": 2}, 4 * 100 + 20 * 3),  # DDP's buckets
        ({"processes": 2, "engine": "zero2"}, 4 * 103 + 12 * 3 / 2),
        ({"processes": 2, "engine": "full"}, (4 * 100 + 16 * 3) / 2),
        ({"state": 0.5}, 4 * 100 + 10 * 3),  # an 8-bit Adam
    ],
)
def test_what_is_held_throughout(flags, expected):
    assert memory.held(4 * 103, 4 * 3, **flags).total == expected
    if not flags:
        assert memory.held(4 * 100, 4 * 100).total == 16 * 100
        assert memory.held(4 * 100, 4 * 100, processes=4).total == 20 * 100


@pytest.mark.parametrize(
    ("optim", "state"), [("adamw_torch", 2), ("adamw_bnb_8bit", 0.5), ("sgd", 0), ("lion_32bit", 1)]
)
def test_the_optimizer_says_what_it_keeps(optim, state, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), optim=optim, use_cpu=True)
    assert memory.optimizer_state(args) == pytest.approx(state, abs=0.02)


@pytest.mark.parametrize(("training", "checkpointing"), [("lora", False), ("full", True)])
@pytest.mark.parametrize("stage", STAGES)
def test_the_estimate_is_within_a_fifth(stage, training, checkpointing, saved, base, data, tmp_path, monkeypatch):
    flags = flags_of(stage, saved, base, data, tmp_path / "run") | {"eval_strategy": "no"}
    flags["gradient_checkpointing"] = checkpointing
    if training == "full":
        flags |= {"model_name_or_path": base, "use_peft": False}
    train, found = Trainer.train, {}

    def watched(trainer, *args, **kwargs):
        gc.collect()
        before = measured_memory.tensors_held()
        need = memory.estimate(trainer, memory.room_of(trainer))(4)
        found["estimate"] = need.total - before
        assert need.weights == before
        with measured_memory.Allocated() as allocated:
            result = train(trainer, *args, **kwargs)
        found["measured"] = allocated.peak
        return result

    monkeypatch.setattr(Trainer, "train", watched)
    run_script(STAGES[stage], **flags)
    assert 0.8 <= found["estimate"] / found["measured"] <= 1.2, found


@pytest.mark.parametrize("stage", STAGES)
def test_an_estimate_leaves_no_trace(stage, saved, base, data, tmp_path, monkeypatch, capsys):
    """The weights and the log of a run are those of one without, to the last digit; remedies are measured too."""
    plan = record.plan
    monkeypatch.setattr(record, "plan", lambda trainer, data, dry_run: plan(trainer, data, dry_run=True))
    monkeypatch.setattr(memory, "room_of", lambda trainer: measured_memory.tensors_held() * 1.5)
    flags = flags_of(stage, saved, base, data, tmp_path / "run") | {"gradient_checkpointing": False}
    folder = run_script(STAGES[stage], **flags)
    assert "--gradient_checkpointing true" in capsys.readouterr().out
    ours, theirs = (load_file(Path(f, "adapter_model.safetensors")) for f in (folder, saved[stage]))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logs = [read_log(Path(f, "training_log.jsonl")) for f in (folder, saved[stage])]
    assert len(logs[0]) == len(logs[1])
    for mine, other in zip(*logs, strict=True):
        same = {key for key in other if not key.endswith(("runtime", "per_second", "flos"))}
        assert {key: mine[key] for key in same} == {key: other[key] for key in same}


def test_what_does_not_fit_is_told_with_what_to_type(base, data, tmp_path, capsys, monkeypatch):
    flags = {"model_name_or_path": base, "dataset_names": data, "output_dir": tmp_path / "run", "dry_run": True}
    flags["gradient_checkpointing"] = False
    run_script("sft_training", **flags)
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]
    assert len(first) == 1 and "activations 0.0" in first[0]
    monkeypatch.setattr(memory, "room_of", lambda trainer: measured_memory.tensors_held() + 2e5)
    run_script("sft_training", **flags, max_length=64)
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "it will not fit" in line)
    options = [line.split(": ") for line in lines[at + 1 :] if line.startswith("    ")]
    assert [float(gb) for _, gb in options] == sorted(float(gb) for _, gb in options)
    for words, _ in options:
        parse("--model_name_or_path=m", "--output_dir=o", *words.split())
    assert any("--per_device_train_batch_size 1 --gradient_accumulation_steps 4" in words for words, _ in options)
    steps = {"--gradient_checkpointing", "--per_device_train_batch_size", "--max_length"}
    assert {words.split()[0] for words, _ in options} == steps


def test_without_room_for_the_weights_nothing_is_measured(base, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "room_of", lambda trainer: 1.0)
    monkeypatch.setattr(memory, "activations", None)
    run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path / "run", dry_run=True)
    assert "activations not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "place", "names"),
    [
        ("0::/user/job", "user/job", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/slurm/job", "memory/slurm/job", measured_memory.V1),
        ("4:memory:/not/seen/here", "memory", measured_memory.V1),
    ],
)
def test_a_container_has_what_its_control_group_leaves(line, place, names, tmp_path, monkeypatch):
    (tmp_path / "cgroup").write_text(f"5:cpuset:/\n{line}\n")
    monkeypatch.setattr(measured_memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(measured_memory, "CGROUPS", tmp_path)
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names[:2], "memory.stat"), ("5000", "1500", f"anon 1\n{names[2]} 500\n"), strict=True):
        (folder / name).write_text(text)
    assert measured_memory.cgroup_room() == 4000
    (folder / names[0]).write_text("max" if "::" in line else "9223372036854771712")
    assert measured_memory.cgroup_room() > 1e18


@pytest.mark.parametrize("stage", STAGES)
def test_checkpointing_is_turned_on_where_a_step_does_not_fit(stage, saved, base, data, tmp_path, monkeypatch, capsys):
    """And only there, and not against the user's word; it says so, and the run then computes activations twice."""
    flags = flags_of(stage, saved, base, data, tmp_path / "run") | {"max_steps": 1, "overwrite_output_dir": True}
    train, on = Trainer.train, []

    def watched(trainer, *args, **kwargs):
        result = train(trainer, *args, **kwargs)
        on.append(trainer.args.activation_checkpointing)
        assert stage == "ppo" or trainer.model.is_activation_checkpointing == on[-1]  # PPO's module says no, always
        return result

    monkeypatch.setattr(Trainer, "train", watched)
    monkeypatch.setattr(memory, "room_of", lambda trainer: measured_memory.tensors_held() * 1.1)
    for asked in ({}, {"gradient_checkpointing": False}):
        run_script(STAGES[stage], **flags | asked)
        assert ("gradient checkpointing is on: a step without it takes" in capsys.readouterr().out) == (not asked)
    monkeypatch.setattr(memory, "room_of", lambda trainer: 1e12)
    run_script(STAGES[stage], **flags)
    assert "checkpointing is on" not in capsys.readouterr().out
    assert on == [True, False, False]


def test_a_model_without_attention_is_sure_to_fit_too(monkeypatch):
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    trainer = SimpleNamespace(model=model, args=SimpleNamespace(per_device_train_batch_size=1))
    monkeypatch.setattr(memory, "longest", lambda trainer, count: [{"input_ids": [1, 2, 3]}])
    assert memory.sure_to_fit(trainer, 1e9) and not memory.sure_to_fit(trainer, 1e3)
    assert not fits_gpu(model)  # nor is it asked for heads there
