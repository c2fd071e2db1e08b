"""Our trainers beside TRL's, from the same model, rows, order and seed."""

import copy

import pytest
import torch
import trl
from transformers import set_seed

from rlhf.runs import trainers
from tests.conftest import run_script

STEPS = {"max_steps": 12, "learning_rate": 1e-3, "eval_strategy": "no", "eval_on_start": False}
STAGES = {"sft_training": "SFT", "reward_modeling": "Reward", "dpo_training": "DPO"}


class Built(Exception):
    """What a script gives its trainer."""


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("script", STAGES)
def test_padded_we_give_trls_losses_and_end_to_end_the_same_to_1e_4(
    script, training, base, data, tmp_path, monkeypatch
):
    checked, found = f"Checked{STAGES[script]}Trainer", {}

    def build(**given):
        found.update(given)
        raise Built

    monkeypatch.setattr(trainers, checked, build)
    flags = STEPS | {"model_name_or_path": base}
    flags |= {"lora_dropout": 0, "learning_rate": 1e-2} if training == "lora" else {"use_peft": False}
    with pytest.raises(Built):
        run_script(script, dataset_names=data, output_dir=tmp_path / "out", **flags)
    monkeypatch.undo()
    pads, logs = found.pop("pad_rows"), []
    assert pads is False
    for module in found["model"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn in another order where rows lie otherwise
    plain, ours = getattr(trl, f"{STAGES[script]}Trainer"), getattr(trainers, checked)
    # the rows are tokens already, and TRL's DPO would tokenise text
    monkeypatch.setattr(trl.DPOTrainer, "_prepare_dataset", lambda self, dataset, *args, **kwargs: dataset)
    for trainer_class, more in ((plain, {}), (ours, {"pad_rows": True}), (ours, {})):
        set_seed(0)
        trainer = trainer_class(
            **found | {"model": copy.deepcopy(found["model"]), "args": copy.copy(found["args"])} | more
        )
        trainer.train()
        logs.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    theirs, padded, flat = (torch.tensor(log, dtype=torch.float64) for log in logs)
    assert theirs.shape == (12, 2) and theirs[:, 0].std() > 1e-3
    assert (padded - theirs).abs().max() <= 1e-6
    assert ((flat - theirs).abs() / theirs.abs().clamp(min=1)).max() <= 1e-4
