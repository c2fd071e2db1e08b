"""Finite, moving, saved: a run stops at its first value that is not finite, one that changed no weight is no result,
and one is complete only when its folder holds what was trained."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from rlhf.models.shards import whole_of
from rlhf.user_error import UserError

UNMOVED = 1e-12  # a change of a weight's sum that no step worth its name leaves
ROUNDING = 1e-9  # of a sum's terms in another order, as a share of their size
CAUSES = (
    "lower --learning_rate, keep --max_grad_norm at 1 or below, or compute in --bf16 instead of --fp16;\n"
    "  what was saved before is kept"
)


class Sums(NamedTuple):
    """What tells a tensor from what it was before, and from another one."""

    shape: tuple
    total: float
    size: float  # the sum of the absolute values; not finite where one value is not

    def near(self, other, share: float = 0.0) -> bool:
        pairs = zip(self[1:], other[1:], strict=True)
        return self.shape == other.shape and all(abs(a - b) <= UNMOVED + share * self.size for a, b in pairs)


def sums_of(weight) -> Sums:
    return Sums(tuple(weight.shape), *(w.sum(dtype=torch.float64).item() for w in (weight, weight.abs())))


def together(found) -> Sums:
    """Of several tensors, whatever their shapes."""
    return Sums((sum(map(math.prod, (one.shape for one in found))),), *(sum(one[i] for one in found) for i in (1, 2)))


def stored_sums(folder: Path, name: str) -> dict[str, Sums]:
    """Of the tensors that can be read in a folder's file, or in the files of its index where that is not there."""
    names, index, found = [name], folder / f"{name}.index.json", {}
    if not (folder / name).exists():
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ()
    for path in (folder / name for name in names):
        with suppress(FileNotFoundError, SafetensorError), safe_open(path, "pt") as file:
            found |= {key: sums_of(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    return found


def check_saved(trainer, sums: dict[str, Sums], folder: Path) -> None:
    """A run is complete when its folder holds each trained weight, whole, as it is at the end.

    Args:
        sums: of the trained weights, by their names.
    Raises:
        UserError: naming the first that it does not.
    """
    keys, file = keys_of(trainer, sums)
    stored = stored_sums(folder, file) | stored_sums(folder, "value_head.safetensors")
    wrong = [name for name, key in keys.items() if key in stored and not stored[key].near(sums[name], ROUNDING)]
    lacking = [name for name, key in keys.items() if key not in stored]
    others = [found for key, found in stored.items() if key not in keys.values()]  # experts are stored one by one
    if lacking and not together(others).near(together([sums[name] for name in lacking]), ROUNDING):
        wrong += lacking
    if wrong:
        raise UserError(
            f"{folder} does not hold what was trained: {wrong[0]} is not there, or another\n"
            f"  ({len(wrong)} such weights); the checkpoints are kept; does another program write there?"
        )


def keys_of(trainer, sums) -> tuple[dict[str, str], str]:
    """{trained weight: its key in the folder}, and the file that the keys are in."""
    model = trainer.plain_model()
    critic = getattr(model, "value_parameters", dict)()
    keys = {name: name if name in critic else name.removeprefix("policy.") for name in sums}
    policy = getattr(model, "policy", model)
    if not isinstance(policy, PeftModel):
        return keys, "model.safetensors"
    empty = {keys[name]: torch.empty(sums[name].shape, device="meta") for name in keys if name not in critic}
    adapter = getattr(trainer, "adapter", "default")
    placed = get_peft_model_state_dict(policy, empty, adapter, save_embedding_layers=False)
    renamed = {id(weight): key for key, weight in placed.items()}
    return {n: renamed.get(id(empty.get(key)), key) for n, key in keys.items()}, "adapter_model.safetensors"


class Sound:
    """Mixin for a `transformers.Trainer`: gradients, logged figures and trained weights are checked as they come."""

    def train(self, *args, **kwargs):
        rows, batch = len(self.train_dataset), self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and rows < batch:
            raise UserError(
                f"--dataloader_drop_last: {rows} rows are less than one batch of {batch}: nothing to train on"
            )
        before = [self.sums()]
        broadcast_object_list(before)  # the same on all: where FSDP shares them out, the first alone has loaded any
        result = super().train(*args, **kwargs)
        if self.state.global_step == 0:
            raise UserError(
                "not one step was trained, so there is nothing to save: fewer rows than a batch?\n"
                "  lower --per_device_train_batch_size, leave out --dataloader_drop_last, give more --num_train_epochs"
            )
        critic = getattr(self.plain_model(), "value_parameters", dict)()  # is not what a run is for
        after = self.check_weights()
        if all(now.near(before[0][name]) for name, now in after.items() if name not in critic):
            raise UserError(
                f"{self.state.global_step} steps changed not one weight, so there is nothing to save\n"
                f"  the rate is {self.args.learning_rate:g}: is it, --lora_alpha or the loss always 0, or every step "
                "skipped?"
            )
        return result

    def plain_model(self):
        return self.accelerator.unwrap_model(self.model)

    def weights(self):
        """Yields the name of each trained weight and all of it, on each process: all have to go through them."""
        for name, parameter in self.plain_model().named_parameters():
            if parameter.requires_grad:
                yield name.replace("_checkpoint_wrapped_module.", ""), whole_of(parameter)

    def sums(self) -> dict[str, Sums]:
        return {name: sums_of(weight) for name, weight in self.weights()}

    def check_weights(self) -> dict[str, Sums]:
        """The sums of the trained weights.

        Raises:
            UserError: naming the first weight that is not finite.
        """
        found = self.sums()
        for name, sums in found.items():
            if not math.isfinite(sums.size):
                raise UserError(f"step {self.state.global_step}: {name} is not finite any more\n  {CAUSES}")
        return found

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that the Trainer computes at each step anyway, before the optimizer uses the gradients."""
        norm = super()._get_grad_norm(model, grad_norm)
        scales = getattr(self.accelerator, "scaler", None) is not None  # fp16's scaler skips steps by itself
        if norm is not None and not scales and not math.isfinite(norm):
            raise UserError(
                f"step {self.state.global_step + 1}: the gradient's norm is {float(norm)}, so the loss is not finite "
                f"or too steep\n  {CAUSES}"
            )
        return norm

    def log(self, logs, *args, **kwargs):
        super().log(logs, *args, **kwargs)
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"step {self.state.global_step}: {name} is {value}\n  {CAUSES}")

    def _save_checkpoint(self, *args, **kwargs):
        self.check_weights()
        super()._save_checkpoint(*args, **kwargs)
