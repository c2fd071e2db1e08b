"""The last batch of an epoch on several processes: each row trains once, as it does on one."""

import torch
from accelerate.utils import gather_object

from rlhf.runs.named_evaluation import alone, pooled, weights_of


def first_rows(batch: dict, rows: int, keep: int) -> dict:
    """The first of a batch's rows; pairs lie with all chosen answers before all rejected ones."""

    def cut(tensor):
        return torch.cat([half[:keep] for half in tensor.split(rows)]) if len(tensor) == 2 * rows else tensor[:keep]

    return {name: cut(value) if torch.is_tensor(value) else value for name, value in batch.items()}


class EachRowOnce:
    """Mixin for TRL's trainers. accelerate fills up the last batch with rows from the epoch's start; they are left out
    again, and a process whose rows are fewer than others' counts for less.
    """

    def real_rows(self) -> list[int]:
        """How many rows of the epoch's last batch each process has."""
        size, processes = self.args.train_batch_size, self.args.world_size
        left = len(self.train_dataset) % (size * processes) or size * processes
        return [min(max(left - process * size, 0), size) for process in range(processes)]

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        args, real = self.args, self.real_rows()
        own, size = real[args.process_index], args.train_batch_size
        fills = args.world_size > 1 and not args.dataloader_drop_last and sum(real) < size * args.world_size
        fills = fills and args.train_sampling_strategy != "batch_rebalance"  # which fills up nothing
        laid_out = batches and len(batches[-1]["input_ids"]) in (size, 2 * size)  # not packed
        if fills and laid_out and self.accelerator.gradient_state.end_of_dataloader:
            batches[-1] = first_rows(batches[-1], size, max(own, 1)) | {"real_rows": real}
            if not own and "labels" in batches[-1]:
                batches[-1]["labels"][:] = -100
            items = self._get_num_items_in_batch(batches, device)
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        real = inputs.pop("real_rows", None)
        if real is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        own, before, found = real[self.args.process_index], self._total_train_tokens, self._metrics["train"]
        with alone(self.accelerator):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
        weights = weights_of(inputs)
        values = [(name, of.pop(), weights.get(name, own)) for name, of in found.items() if name != "num_tokens"]
        values = [(name, value, weight) for name, value, weight in values if own]
        for name, value in pooled(gather_object(values)).items():
            found[name].append(value)
        tokens = gather_object([(self._total_train_tokens - before) * (own > 0)])
        self._total_train_tokens = before + sum(tokens)
        found["num_tokens"] = [self._total_train_tokens]
        if "labels" not in inputs:  # else it is a sum over tokens already
            loss = loss * own * self.args.world_size / sum(real)
        return loss
