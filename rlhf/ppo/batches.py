"""Which prompts an update samples answers to, and which of them each mini-batch and micro-batch trains on."""

import torch
from torch.utils.data import Sampler


class BatchSampler(Sampler):
    """Indices of one batch of prompts after another, each batch `repeats` times in a row (once a micro-step).

    The prompts are shuffled anew each time all have been used; the order depends on the seed alone.
    """

    def __init__(self, num_prompts: int, batch_size: int, num_batches: int, repeats: int, seed: int):
        self.num_prompts, self.batch_size, self.num_batches = num_prompts, batch_size, num_batches
        self.repeats, self.seed = repeats, seed

    def __len__(self):
        return self.num_batches * self.batch_size * self.repeats

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        order = []
        for _ in range(self.num_batches):
            while len(order) < self.batch_size:
                order += torch.randperm(self.num_prompts, generator=generator).tolist()
            batch, order = order[: self.batch_size], order[self.batch_size :]
            for _ in range(self.repeats):
                yield from batch


def mini_batch_rows(ppo, process: int, update: int, epoch: int, mini_batch: int) -> torch.Tensor:
    """Rows of a process's batch that belong to a mini-batch.

    Of each `num_mini_batches` rows in a row, one goes to each mini-batch, drawn by (seed, update, epoch): so the
    mini-batches are the same however many processes share the batch.
    """
    count = ppo.num_mini_batches
    generator = torch.Generator().manual_seed(hash((ppo.seed, update, epoch)) % 2**63)
    chosen = torch.rand(ppo.batch_size // count, count, generator=generator).argsort(1)[:, mini_batch]
    rows = torch.arange(0, ppo.batch_size, count) + chosen
    first = process * ppo.local_batch_size
    return rows[(rows >= first) & (rows < first + ppo.local_batch_size)] - first
