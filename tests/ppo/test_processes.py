"""PPO on two processes is PPO on one: `pytest tests/ppo/test_processes.py`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_processes, run_script

BATCH = 8
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def runs(saved, data, tmp_path_factory):
    """One run on one process and one on two, with the same batches; and what the two print."""
    flags = {
        "model_name_or_path": saved["sft"],
        "reward_model_name_or_path": saved["reward"],
        "dataset_names": data,
        "validation_split_percentage": 20,  # 11 prompts: the two answer 6 and 5
        "gradient_accumulation_steps": 4,  # two micro-batches a mini-batch
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "response_length": 16,
        "stop_token_id": 267,  # a frequent one: answers of all lengths
        "missing_eos_penalty": 1.0,
        "whiten_rewards": True,
        "adaptive_kl_target": 1.0,
        "save_steps": 2,
        "optim": "sgd",  # Adam's first steps are the gradients' signs, also of those that are 0 but for rounding
        "learning_rate": 0.1,
        "use_cpu": True,
        "bf16": False,
    }
    folder = tmp_path_factory.mktemp("processes")
    two = {**flags, "per_device_train_batch_size": BATCH // 8, "output_dir": folder / "two"}
    printed = run_processes("ppo_training", [two, two])
    assert [code for code, _ in printed] == [0, 0], printed
    one = Path(run_script("ppo_training", output_dir=folder / "one", per_device_train_batch_size=BATCH // 4, **flags))
    return one, folder / "two", [text for _, text in printed]


def log(folder):
    lines = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(("runtime", "per_second", "flos"))} for line in lines]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_two_processes_log_the_metrics_of_one(runs):
    """Catches sums or means over one process's rows only, whitening by them, or answers drawn with another's noise.

    Sums of float32 in another order differ by 4e-6 at most.
    """
    one, two, _ = runs
    assert 0 < log(one)[1]["val/eos_rate"] < 1 and log(one)[1]["val/mean_length"] < 15, "answers of one length"
    assert len(log(one)) == len(log(two)) == 6  # evaluations at the start and after each update, updates, the end
    for ours, theirs in zip(log(two), log(one), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert {"eval_pairs_win_rate", "objective/kl_coef", "val/ratio"} <= {key for line in log(two) for key in line}


def test_two_processes_show_samples_of_one(runs):
    """Catches prompts answered with another prompt's noise, or beside another prompt's starting answer."""
    one, two, _ = runs
    for path in (two / "samples").iterdir():
        ours, theirs = (
            {json.loads(line)["prompt"]: json.loads(line) for line in p.open()}
            for p in (path, one / "samples" / path.name)
        )
        assert ours.keys() == theirs.keys()
        for prompt, sample in ours.items():
            for key, value in sample.items():
                assert theirs[prompt][key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)


def test_two_processes_train_the_weights_of_one(runs, saved):
    """Catches gradients that are averaged where they should be summed, and mini-batches of other rows.

    The weights move by 1e-3 and more, and differ by 3e-8.
    """
    one, two, _ = runs
    start = load_file(Path(saved["sft"]) / ADAPTER)
    reward = load_file(Path(saved["reward"]) / ADAPTER)
    start["value_head.weight"] = reward["base_model.model.score.weight"]
    start |= {f"policy.{name.replace('.weight', '.value.weight')}": weight for name, weight in reward.items()}
    for model in (ADAPTER, "value_head.safetensors"):
        ours, theirs = load_file(two / model), load_file(one / model)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert (value - start[name]).abs().max() > 1e-4, f"{name} has hardly moved"
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)


def test_only_the_first_process_writes(runs):
    """Catches checkpoints written by two at once, and lines printed twice."""
    one, two, printed = runs
    own = {name.replace("rng_state_0", "rng_state") for name in files(two) if not name.endswith("rng_state_1.pth")}
    assert own == files(one)
    assert "saved in" in printed[0] and "saved in" not in printed[1]
