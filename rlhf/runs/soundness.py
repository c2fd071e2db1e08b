"""Finite and moving: a run stops at its first value that is not finite, and one that changed nothing is no result."""

import math

import torch

from rlhf.user_error import UserError

UNMOVED = 1e-12  # a change of a weight's sum that no step worth its name leaves
CAUSES = (
    "lower --learning_rate, keep --max_grad_norm at 1 or below, or compute in --bf16 instead of --fp16;\n"
    "  what was saved before is kept"
)


class Sound:
    """Mixin for a `transformers.Trainer`: gradients, logged figures and trained weights are checked as they come."""

    def train(self, *args, **kwargs):
        rows, batch = len(self.train_dataset), self.args.train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and rows < batch:
            raise UserError(
                f"--dataloader_drop_last: {rows} rows are less than one batch of {batch}: nothing to train on"
            )
        before = self.trained_sums()
        result = super().train(*args, **kwargs)
        self.check_weights()
        if self.state.global_step == 0:
            raise UserError(
                "not one step was trained, so there is nothing to save: fewer rows than a batch?\n"
                "  lower --per_device_train_batch_size, leave out --dataloader_drop_last, give more --num_train_epochs"
            )
        if torch.allclose(self.trained_sums(), before, rtol=0, atol=UNMOVED):
            raise UserError(
                f"{self.state.global_step} steps changed not one weight, so there is nothing to save\n"
                f"  the rate is {self.args.learning_rate:g}: is it, --lora_alpha or the loss always 0, or every step "
                "skipped?"
            )
        return result

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, of a sharded one this process's part."""
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        own = {name: p.detach() for name, p in named if p.requires_grad}
        return {name: p.to_local() if hasattr(p, "to_local") else p for name, p in own.items()}

    def trained_sums(self) -> torch.Tensor:
        """Two sums of each trained weight, (weights, 2): training that leaves all as they were has done nothing.

        A critic's are left out: it is not what a run is for.
        """
        critic = getattr(self.accelerator.unwrap_model(self.model), "value_parameters", dict)()
        weights = [weight for name, weight in self.trained().items() if name not in critic]
        sums = [[w.sum(dtype=torch.float64), w.abs().sum(dtype=torch.float64)] for w in weights]
        return torch.tensor(sums, dtype=torch.float64)

    def check_weights(self) -> None:
        """Raises a UserError that names the first trained weight that is not finite."""
        for name, weight in self.trained().items():
            if weight.numel() and not torch.isfinite(weight).all():
                raise UserError(f"step {self.state.global_step}: {name} is not finite any more\n  {CAUSES}")

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
