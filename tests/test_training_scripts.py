"""What each training script leaves behind and refuses: `pytest tests/test_training_scripts.py`.

The runs themselves are in conftest.py's `saved`: SFT, reward model, DPO and PPO on a random GPT-2 of two layers.
"""

import json
import math
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rlhf.models.fingerprints import tokenizer_sha256
from rlhf.runs.trainers import CheckedDPOTrainer, CheckedSFTTrainer
from rlhf.user_error import UserError
from tests.conftest import run_script


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "training_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_a_run_leaves_one_adapter_and_its_record(saved, base, data, stage):
    folder = Path(saved[stage])
    for name in ("adapter_model.safetensors", "chat_template.jinja", "learning_curves.png", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert not (folder / "ref").exists()
    run = json.loads((folder / "run.json").read_text())
    assert run["base_model"] == base and run["arguments"]["dataset_names"] == data
    assert run["parent"] == (base if stage == "sft" else saved["sft"])
    assert run["data"]["tokenized"]["kept"] > 0 and run["versions"]["trl"]
    assert any(key.startswith("eval_pairs_") for entry in log(folder) for key in entry)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo"])
def test_the_record_holds_the_hashes_of_what_was_trained_on(saved, base, stage):
    """Computed here anew: one that is missing or wrong would let a base that changed since pass."""
    run = json.loads((Path(saved[stage]) / "run.json").read_text())
    assert run["base_sha256"] == sha256((Path(base) / "model.safetensors").read_bytes()).hexdigest()
    parent = None
    if stage != "sft":
        parent = sha256((Path(saved["sft"]) / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert run["parent_sha256"] == parent
    assert run["base_revision"] is None  # a folder has no commit
    # the folder has the tokenizer that its record speaks of
    assert run["tokenizer_sha256"] == tokenizer_sha256(AutoTokenizer.from_pretrained(saved[stage]))
    other = AutoTokenizer.from_pretrained(saved[stage])
    other.chat_template += " "
    assert run["tokenizer_sha256"] != tokenizer_sha256(other)


def test_a_whole_model_is_not_called_an_adapter(base, data, tmp_path, capsys):
    flags = {"model_name_or_path": base, "dataset_names": data, "use_peft": False, "learning_rate": 1e-3}
    folder = Path(run_script("dpo_training", output_dir=tmp_path / "dpo", **flags))
    assert f"saved in {folder}\n" in capsys.readouterr().out
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_a_set_that_has_no_rows_of_its_own_is_left_out_with_a_line(base, data, tmp_path, capsys):
    copy = shutil.copy(data, tmp_path / "copy.jsonl")
    flags = {"model_name_or_path": base, "dataset_names": f"{data},{copy}", "output_dir": tmp_path / "run"}
    run_script("sft_training", dry_run=True, **flags)
    assert "plan: " in (said := capsys.readouterr().out) and "copy" in said


def test_training_on_from_a_base_that_changed_since_is_refused(saved, base, data, tmp_path):
    adapter, moved = shutil.copytree(saved["sft"], tmp_path / "sft"), shutil.copytree(base, tmp_path / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    weights = load_file(moved / "model.safetensors")
    weights["transformer.wte.weight"][7, 3] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    for script in ("dpo_training", "reward_modeling"):
        with pytest.raises(UserError, match="has changed since the adapter was trained on it"):
            run_script(script, model_name_or_path=adapter, dataset_names=data, output_dir=tmp_path / script)


def test_each_stage_changes_the_weights_it_started_from(saved):
    adapters = {stage: load_file(Path(folder) / "adapter_model.safetensors") for stage, folder in saved.items()}
    for stage in ("reward", "dpo", "ppo"):
        shared = [key for key in adapters["sft"] if key in adapters[stage]]
        assert len(shared) == len(adapters["sft"])
        assert any(not torch.equal(adapters["sft"][key], adapters[stage][key]) for key in shared)


def test_the_first_dpo_loss_is_ln_2_and_its_margin_0(saved):
    first = next(entry for entry in log(saved["dpo"]) if "eval_pairs_loss" in entry)
    assert first["step"] == 0 and abs(first["eval_pairs_loss"] - math.log(2)) < 1e-5
    assert abs(first["eval_pairs_rewards/margins"]) < 1e-6


def test_a_dpo_run_whose_reference_is_another_model_stops(saved, data, tmp_path, monkeypatch):
    """As when the reference is the raw base although the policy holds SFT: the mistake that ends well elsewhere."""
    init = CheckedDPOTrainer.__init__

    def spoiled(self, *args, **kwargs):
        init(self, *args, **kwargs)
        for name, parameter in self.model.named_parameters():
            if ".ref." in name:
                parameter.data.zero_()

    monkeypatch.setattr(CheckedDPOTrainer, "__init__", spoiled)
    with pytest.raises(AssertionError, match="policy and reference differ"):
        run_script("dpo_training", model_name_or_path=saved["sft"], dataset_names=data, output_dir=tmp_path / "dpo")


def test_a_batch_without_a_label_stops_the_run():
    with pytest.raises(AssertionError, match="without a single label"):
        CheckedSFTTrainer.compute_loss(None, None, {"labels": torch.full((2, 3), -100)})


@pytest.mark.parametrize("stage", ["sft_training", "reward_modeling", "dpo_training"])
def test_a_quantised_base_leaves_what_is_trained_in_float32(saved, data, tmp_path, stage):
    """TRL's trainers round it to bfloat16, in which DPO's small steps vanish and a reward model's head fails."""
    flags = {"model_name_or_path": saved["sft"], "dataset_names": data, "load_in_4bit": True, "max_steps": 1}
    folder = Path(run_script(stage, output_dir=tmp_path / "out", **flags))
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    lora = torch.cat([weight.flatten() for weight in weights.values()])
    assert not torch.equal(lora.bfloat16().float(), lora)


@pytest.mark.parametrize(
    ("flags", "says"), [({"beta": 0.0}, "--beta must be above 0"), ({"neftune_noise_alpha": 5}, "noise")]
)
def test_dpo_flags_that_would_teach_nothing_are_refused(saved, data, tmp_path, flags, says):
    with pytest.raises(UserError, match=says):
        run_script("dpo_training", model_name_or_path=saved["sft"], dataset_names=data, output_dir=tmp_path, **flags)


def test_a_finished_folder_is_not_trained_into_again(saved, base, data):
    before = (Path(saved["sft"]) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        run_script("sft_training", model_name_or_path=base, dataset_names=data, output_dir=saved["sft"])
    assert (Path(saved["sft"]) / "adapter_model.safetensors").read_bytes() == before
