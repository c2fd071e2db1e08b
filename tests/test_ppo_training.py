"""What ppo_training.py refuses before it trains: `pytest tests/test_ppo_training.py`."""

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from rlhf.user_error import UserError
from tests.conftest import run_script

RAISES = """
def nan(prompts, completions, **columns):
    return [float("nan")] * len(prompts)
"""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"reward_model_name_or_path": "SFT"}, "has no trained `score` head: it is not a reward model"),
        ({"reward_model_name_or_path": "TWO_LABELS"}, "has 2 labels: a reward model has one"),
        ({"reward_model_name_or_path": ""}, "--reward_model_name_or_path is missing"),
        ({"reward_model_name_or_path": "NAN"}, r"returned nan\n  prompt: .*\n  answer: "),
        ({"response_length": 125}, "--response_length 125 leaves no room for a prompt"),
        ({"per_device_train_batch_size": 64}, "prompts are fewer than one batch of 64"),
        ({"num_mini_batches": 3}, "--num_mini_batches 3 does not divide a process's batch of 4"),
        ({"value_adapter": True, "use_peft": False, "model_name_or_path": "BASE"}, "--value_adapter needs a LoRA"),
        ({"model_adapter_name": "other"}, "--model_adapter_name other: the policy has default"),
        ({"ref_adapter_name": "other"}, "--ref_adapter_name other: the policy has default"),
        ({"sft_model_path": "SFT"}, "unknown flag sft_model_path: today's is --model_name_or_path"),
        ({"stop_token": "eot"}, "invalid choice: 'eot'"),
        ({"stop_token_id": 9999}, "--stop_token_id 9999: the tokenizer has"),
        ({"num_ppo_epochs": 0}, "--num_ppo_epochs must be at least 1"),
        ({"adaptive_kl_target": 0.0}, "--adaptive_kl_target must be above 0"),
        ({"auto_find_batch_size": True}, "does not fit PPO: lower --per_device_train_batch_size instead"),
        ({"eval_strategy": "epoch"}, "PPO counts updates, see --eval_steps"),
        ({"load_best_model_at_end": True}, "--metric_for_best_model eval_<dataset>_scores"),
        ({"target_kl": 0.1, "fp16": True}, "--fp16 false"),
        ({"use_score_norm": True, "reward_model_name_or_path": "NAN"}, "no score_statistics.json"),
    ],
)
def test_a_mistake_ends_a_run_before_training(saved, base, data, tmp_path, flags, message):
    (tmp_path / "rewards.py").write_text(RAISES)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).save_pretrained(tmp_path / "two")
    for file in Path(base).glob("*token*"):
        (tmp_path / "two" / file.name).write_bytes(file.read_bytes())
    paths = {"SFT": saved["sft"], "BASE": base, "TWO_LABELS": tmp_path / "two", "NAN": f"{tmp_path}/rewards.py:nan"}
    flags = {key: paths.get(value, value) for key, value in flags.items()}
    defaults = {"model_name_or_path": saved["sft"], "reward_model_name_or_path": saved["reward"], "response_length": 8}
    output = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        run_script(
            "ppo_training",
            **{"dataset_names": data, "output_dir": output, "eval_on_start": False},
            **(defaults | flags),
        )
    assert not list(output.glob("**/*.safetensors")) and not (output / "run.json").exists()


def test_a_run_is_resumed_with_the_same_updates_and_critic(saved, data, tmp_path):
    """A step would lie elsewhere in its update, and a critic of another kind would not find its weights."""
    flags = {"model_name_or_path": saved["sft"], "reward_model_name_or_path": saved["reward"], "dataset_names": data}
    flags |= {"output_dir": tmp_path / "ppo", "response_length": 8, "eval_on_start": False, "save_steps": 1}
    run_script("ppo_training", max_steps=1, **flags)
    (tmp_path / "ppo" / "run.json").unlink()
    started = tmp_path / "ppo" / "started.json"
    as_it_was = started.read_text()
    for changed, text in (
        ({"num_ppo_epochs": 2}, "num_ppo_epochs: left out, and now"),
        ({"value_adapter": False}, "critic: a LoRA, and now left out"),
        ({"num_mini_batches": 2}, "num_mini_batches: left out, and now"),
        ({}, "critic: left out, and now a LoRA"),  # of a version whose default was a head
    ):
        if not changed:
            started.write_text(as_it_was.replace('"critic"', '"other"'))
        with pytest.raises(UserError, match=f"started with other arguments or inputs:\n  {text}"):
            run_script("ppo_training", max_steps=1, **(flags | changed))
