"""A run is finite and moves, or it ends with a line: `pytest tests/runs/test_soundness.py`."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

from rlhf.runs.command_line import as_typed
from rlhf.user_error import UserError, visible
from tests.conftest import run_script

STAGES = {"sft": "sft_training", "reward": "reward_modeling", "dpo": "dpo_training", "ppo": "ppo_training"}


def flags_of(stage, saved, base, data, folder) -> dict:
    flags = {"model_name_or_path": base if stage == "sft" else saved["sft"], "dataset_names": data}
    flags |= {"reward_model_name_or_path": saved["reward"], "response_length": 8} if stage == "ppo" else {}
    return flags | {"output_dir": folder, "max_steps": 3, "save_steps": 1, "eval_on_start": False}


def spoil(road: str, at: int, patch):
    """Something that is not a number, from a step on."""
    loss, step = Trainer.training_step, torch.optim.AdamW.step

    def bad_loss(self, model, *args, **kwargs):
        found = loss(self, model, *args, **kwargs)
        if self.state.global_step >= at:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf" if road == "inf" else "nan"))
                    break
        return found

    def bad_step(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data[0] = float("nan")
        return result

    if road == "weights":
        patch.setattr(torch.optim.AdamW, "step", bad_step)
    else:
        patch.setattr(Trainer, "training_step", bad_loss)


@pytest.mark.parametrize("road", ["nan", "inf", "weights"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_first_value_that_is_not_finite_stops_the_run(stage, road, saved, base, data, tmp_path, monkeypatch):
    spoil(road, 1, monkeypatch)
    flags = flags_of(stage, saved, base, data, tmp_path / "run")
    with pytest.raises(UserError, match="step [0-9]+: .*(nan|inf|not finite)") as error:
        run_script(STAGES[stage], **flags)
    assert len(str(error.value).splitlines()) <= 3
    assert not (tmp_path / "run" / "run.json").exists()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("stage", "flags", "says"),
    [
        ("sft", {"learning_rate": 1e-30}, "changed not one weight"),
        ("reward", {"learning_rate": 1e-30}, "changed not one weight"),
        ("dpo", {"learning_rate": 1e-30}, "changed not one weight"),
        (
            "sft",
            {"dataloader_drop_last": True, "per_device_train_batch_size": 200, "max_steps": -1},
            "less than one batch",
        ),
        ("ppo", {"learning_rate": 1e-30}, "changed not one weight"),
        ("ppo", {"value_warmup_updates": 3}, "changed not one weight"),
    ],
)
def test_a_run_that_trains_nothing_is_no_result(stage, flags, says, saved, base, data, tmp_path):
    with pytest.raises(UserError, match=says):
        run_script(STAGES[stage], **flags_of(stage, saved, base, data, tmp_path / "run") | flags)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_a_model_that_is_not_finite_is_refused_when_it_is_loaded(stage, what, saved, base, data, tmp_path):
    if what == "adapter" and stage == "sft":
        stage = "dpo"
    folder = shutil.copytree(base if what == "base" else saved["sft"], tmp_path / "model")
    path = next(folder.glob("*.safetensors"))
    weights = load_file(path)
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    flags = flags_of(stage, saved, base, data, tmp_path / "run") | {"model_name_or_path": folder}
    with pytest.raises(UserError, match="model is damaged: .* not finite"):
        run_script(STAGES[stage], **flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import sys\nsys.exit(0)", "cannot be imported: SystemExit"),
        ("import sys\ndef r(prompts, **_):\n    sys.exit(0)", "raised SystemExit"),
        ("def r(prompts, **_):\n    return [float('nan')] * len(prompts)", "returned nan"),
    ],
)
def test_a_reward_file_that_ends_the_process_ends_no_run_well(code, says, saved, base, data, tmp_path):
    (tmp_path / "r.py").write_text(code)
    flags = flags_of("ppo", saved, base, data, tmp_path / "run") | {"reward_model_name_or_path": f"{tmp_path}/r.py:r"}
    with pytest.raises(UserError, match=says):
        run_script("ppo_training", **flags)


def test_text_of_data_cannot_steer_a_terminal():
    assert visible("a\x1b[31mb\r\n\tc\u202e") == "a\\x1b[31mb\\r\n\tc\\u202e"


def test_a_command_is_shown_without_its_secrets():
    typed = ["sft_training.py", "--hub_token", "hf_x", "--hub_token=hf_y", "--stop_token", "eos", "--seed", "1"]
    assert as_typed(typed) == "sft_training.py --hub_token ... --hub_token=... --stop_token eos --seed 1"
