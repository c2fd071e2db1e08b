"""What PPO saves and resumes beside the Trainer's own state: the policy, the critic, and the KL coefficient."""

import json
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors.torch import load_file, load_model, save_file

VALUE_HEAD = "value_head.safetensors"  # with the critic's own LoRA, where it has one
STATE = "ppo_state.json"


def save(trainer, folder: Path, weights: dict | None = None) -> None:
    """Write the policy (its adapter alone, where it has one) as any PEFT tool reads it, and what PPO adds to it.

    Args:
        weights: what is trained, by name, where an engine keeps it elsewhere than in the model.
    """
    model, weights = trainer.accelerator.unwrap_model(trainer.model), weights or {}
    options = {"selected_adapters": [trainer.adapter]} if isinstance(model.policy, PeftModel) else {}
    policy = {name.removeprefix("policy."): weight for name, weight in weights.items() if name.startswith("policy.")}
    model.policy.save_pretrained(folder, state_dict=policy or None, **options)
    critic = {n: weights.get(n, p).detach().cpu().contiguous() for n, p in model.value_parameters().items()}
    save_file(critic, folder / VALUE_HEAD)
    state = {"kl_coef": trainer.kl_coef, "metrics": trainer.metrics}  # of updates that are not logged yet
    (folder / STATE).write_text(json.dumps(state) + "\n")
    trainer.processing_class.save_pretrained(folder)
    torch.save(trainer.ppo, folder / "training_args.bin")


def load(trainer, folder: Path) -> None:
    """The policy and the critic."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model.policy, PeftModel):
        weights = load_peft_weights(folder, device="cpu")
        set_peft_model_state_dict(model.policy, weights, adapter_name=trainer.adapter)
    else:
        load_model(model.policy, folder / "model.safetensors")
    critic = load_file(folder / VALUE_HEAD)
    for name, parameter in model.value_parameters().items():
        parameter.data.copy_(critic[name])


def load_state(trainer, folder: Path) -> None:
    """The KL coefficient, and metrics of updates that are not logged yet."""
    state = json.loads((folder / STATE).read_text())
    trainer.kl_coef = state["kl_coef"]
    trainer.metrics.update(state.get("metrics", {}))
