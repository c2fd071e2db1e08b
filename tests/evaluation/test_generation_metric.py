"""SFT's metric by real generation, and what it decides: `pytest tests/evaluation/test_generation_metric.py`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.data.loading import load_held_out
from rlhf.evaluation import generation_metric
from rlhf.evaluation.generation_metric import GeneratedRouge, first_answer
from rlhf.evaluation.statistics import rouge
from rlhf.models.loading import load_frozen_policy, load_tokenizer
from rlhf.models.rendering import token_ids
from rlhf.user_error import UserError
from tests.conftest import run_script

METRIC = {"generate_eval_samples": 4, "generate_eval_length": 12}
FLAGS = {"learning_rate": 1e-2, "validation_split_percentage": 30, "max_steps": 4, "eval_strategy": "steps"}


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]


def test_the_metric_is_the_rouge_of_what_the_saved_model_generates(base, data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(generation_metric, "rouge", lambda *texts: asked.append(texts) or rouge(*texts))
    flags = METRIC | FLAGS | {"eval_steps": 4}
    folder = run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path, **flags)
    found = [entry for entry in log(folder) if "eval_rouge_avg" in entry]
    assert [entry["step"] for entry in found] == [0, 4]  # one entry an evaluation
    predictions, references = asked[-1]
    assert len(predictions) == 4 and set(references) <= {
        " Down the hill, past the bakery and the old clock.", " The three sisters do, and they sing while they work.",
        " Yes, and the gulls are laughing at us.", " Ten minutes, if the wind is kind."}  # fmt: skip
    rows = json.loads((tmp_path / "run.json").read_text())
    assert rows["metrics"]["last"]["eval_rouge_avg"] == found[-1]["eval_rouge_avg"]
    scores = rouge(predictions, references)
    for name in ("rouge1", "rouge2", "rougeL", "rouge_avg"):
        assert found[-1][f"eval_{name}"] == pytest.approx(sum(scores[name]) / 4)
    # transformers' own greedy search says the same to the same questions
    tokenizer = load_tokenizer(str(folder))
    model, made = load_frozen_policy(str(folder), tokenizer), set()
    for row in load_held_out(data, "prompt", validation_split_percentage=30)[0]["pairs"]:
        ids = torch.tensor([token_ids(tokenizer, row["prompt"], add_generation_prompt=True)])
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        made.add(tokenizer.decode(answer, skip_special_tokens=True))
    assert set(predictions) <= made


@pytest.fixture
def scripted(monkeypatch):
    """Evaluations whose ROUGE is written beforehand: the second of training is the best."""
    values = iter([0.1, 0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.7])
    monkeypatch.setattr(GeneratedRouge, "__call__", lambda self: {"rouge_avg": next(values)})


BEST = {"metric_for_best_model": "eval_rouge_avg", "load_best_model_at_end": True}


def test_the_best_checkpoint_by_rouge_is_what_is_saved(base, data, tmp_path, scripted, capsys):
    flags = METRIC | FLAGS | BEST | {"eval_steps": 1, "early_stopping_patience": 3}
    run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path, **flags)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    saved, best, other = (
        load_file(f / "adapter_model.safetensors")
        for f in (tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-1")
    )
    assert all(torch.equal(saved[key], best[key]) for key in saved)
    assert any(not torch.equal(saved[key], other[key]) for key in saved)
    said = capsys.readouterr().out
    assert "the best is saved: checkpoint-2, eval_rouge_avg 0.9000" in said and "stops at step" not in said
    assert [entry["step"] for entry in log(tmp_path) if "loss" in entry] == [1, 2, 3, 4]
    assert (tmp_path / "learning_curves.png").exists()


def test_patience_ends_the_run(base, data, tmp_path, scripted, capsys):
    flags = METRIC | FLAGS | BEST | {"eval_steps": 1, "early_stopping_patience": 1}
    run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path, **flags)
    assert [entry["step"] for entry in log(tmp_path) if "loss" in entry] == [1, 2, 3]
    assert "stops at step 3: 1 evaluation in a row without a better eval_rouge_avg" in capsys.readouterr().out


def test_a_best_checkpoint_that_is_worse_than_the_start_is_told(base, data, tmp_path, monkeypatch, capsys):
    values = iter([0.9, 0.2, 0.1, 0.1, 0.1])
    monkeypatch.setattr(GeneratedRouge, "__call__", lambda self: {"rouge_avg": next(values)})
    flags = METRIC | FLAGS | BEST | {"eval_steps": 1}
    run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path, **flags)
    assert "but the model that it started from was better: 0.9000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "metric"),
    [("reward_modeling", "margin"), ("dpo_training", "rewards/margins"), ("ppo_training", "scores")],
)
def test_patience_ends_the_run_of_each_stage(script, metric, saved, data, tmp_path):
    """A metric that is said to be better the smaller it is, and grows; or at a rate of almost 0 stays."""
    flags = {"model_name_or_path": saved["sft"], "dataset_names": data, "max_steps": 12, "output_dir": tmp_path}
    flags |= {"learning_rate": 1e-12 if script == "ppo_training" else 1e-2, "eval_strategy": "steps", "eval_steps": 1}
    flags |= {"metric_for_best_model": f"eval_pairs_{metric}", "greater_is_better": False, "save_strategy": "no"}
    if script == "ppo_training":
        flags |= {"reward_model_name_or_path": saved["reward"], "response_length": 8, "eval_steps": 1}
    run_script(script, early_stopping_patience=2, **flags)
    assert len([entry for entry in log(tmp_path) if f"eval_pairs_{metric}" in entry]) < 8


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (BEST, "--generate_eval_samples 100"),
        (BEST | {"metric_for_best_model": "loss"}, "eval_pairs_loss"),
        ({"early_stopping_patience": 2}, "needs --metric_for_best_model"),
        ({"generate_eval_samples": 4, "generate_eval_length": 128}, "leaves no held-out prompt room"),
        ({"generate_eval_samples": -1}, "must be at least 0, not -1"),
    ],
)
def test_settings_that_could_not_work_are_refused_before_training(base, data, tmp_path, flags, says):
    with pytest.raises(UserError) as error:
        run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=tmp_path, **FLAGS | flags)
    assert says in str(error.value) and not list(tmp_path.glob("checkpoint-*"))


def test_of_a_dialogue_the_first_answer_is_generated():
    row = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, -100, 7, 8, -100, 10]}
    assert first_answer(row) == ([5, 6], [7, 8])


def test_curves_are_drawn_of_a_run_that_is_stopped(base, data, tmp_path, monkeypatch):
    from transformers import Trainer

    step, steps = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(0)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_script("reward_modeling", model_name_or_path=base, dataset_names=data, output_dir=tmp_path, max_steps=9)
    assert (tmp_path / "learning_curves.png").stat().st_size > 5000 and len(log(tmp_path)) >= 2
