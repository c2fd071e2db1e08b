"""The LoRA that the flags ask for: a new one, of layers that the model has; or one that is continued as it is."""

from dataclasses import fields

import torch
from peft import LoraConfig
from transformers.pytorch_utils import Conv1D

from rlhf.models.adapters import adapter_settings, merge_command
from rlhf.user_error import UserError


def check_layers(model, model_args) -> None:
    """Each layer that a LoRA flag names is in the model: PEFT passes over one that is not, if another is.

    Raises:
        UserError: with the names that there are.
    """
    able = (torch.nn.Linear, torch.nn.Embedding, Conv1D, torch.nn.Conv1d, torch.nn.Conv2d)
    layers = [name for name, module in model.named_modules() if isinstance(module, able)]
    saved = [name for name, module in model.named_modules() if list(module.parameters())]
    # PEFT has no LoRA for a parameter that is stored as its transpose
    transposed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Conv1D))
    weights = [name for name, _ in model.named_parameters() if not name.startswith(transposed)]
    for flag, there in (
        ("lora_target_modules", layers),
        ("lora_modules_to_save", saved),
        ("lora_target_parameters", weights),
    ):
        names = getattr(model_args, flag)
        for wanted in names if isinstance(names, list) and names != ["all-linear"] else ():
            if not any(f".{name}".endswith(f".{wanted}") for name in there):
                known = ", ".join(sorted({name.rpartition(".")[2] for name in there if name[-1:].isalpha()}))
                raise UserError(f"--{flag} {wanted}: the model has no such one\n  it has {known[:220]}")


def lora_config(model, model_args, task_type: str) -> LoraConfig:
    check_layers(model, model_args)
    return LoraConfig(
        task_type=task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        revision=None if model_args.model_revision == "main" else model_args.model_revision,
        bias="none",
    )


def check_continues(adapter, model_args):
    """An adapter is continued as it is: LoRA flags that say otherwise are a misunderstanding."""
    config = adapter_settings(adapter)
    if not model_args.use_peft:
        raise UserError(f"{adapter} is an adapter: merge it before training all weights,\n  {merge_command(adapter)}")
    names = {name: name for name in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
    names |= {"lora_r": "r", "model_revision": "revision", "lora_modules_to_save": "modules_to_save"}
    names |= {"lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters"}
    for f in fields(model_args):
        value, default = getattr(model_args, f.name), "all-linear" if f.name == "lora_target_modules" else f.default
        if f.name not in names or value == default:
            continue
        now = config.get(names[f.name])
        if isinstance(value, list):  # an adapter may name its layers by their whole paths
            same = now and all(any(f".{path}".endswith(f".{name}") for name in value) for path in now)
            same = same and all(any(f".{path}".endswith(f".{name}") for path in now) for name in value)
            now = ", ".join(sorted({path.rpartition(".")[2] for path in now or ()})) or None
        else:
            same = value == now
        if not same:
            raise UserError(
                f"--{f.name} {value}: the adapter {adapter} has {now}, and training continues it as it is\n"
                "  leave the flag out, or merge the adapter first and train a new one on the result"
            )
