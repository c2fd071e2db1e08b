"""Held-out metrics that are the rows' own: under the name of their dataset, the same at any batch size and any number
of processes.
"""

from contextlib import contextmanager
from math import ceil

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from rlhf.user_error import UserError


class OwnBatches:
    """The rows that one of several processes evaluates, in batches.

    All give as many batches, since a forward pass of sharded weights takes all: after the `real` ones follow others
    that do not count.
    """

    def __init__(self, rows: int, size: int, process: int, processes: int):
        own = range(process, rows, processes)
        batches = [list(own[start : start + size]) for start in range(0, len(own), size)]
        self.real = len(batches)
        self.batches = batches + [[0]] * (ceil(ceil(rows / processes) / size) - self.real)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


@contextmanager
def alone(accelerator):
    """TRL gathers the metrics of each batch from all processes; here a process keeps its own.

    Gives the list of what it gathers of rows: a reward model's scores, or DPO's chosen rewards, then the rejected.
    """
    rows = []
    accelerator.gather = lambda value: rows.append(value) or value
    accelerator.gather_for_metrics = lambda value, *args, **kwargs: value
    try:
        yield rows
    finally:
        del accelerator.gather, accelerator.gather_for_metrics


def weights_of(inputs: dict) -> dict[str, int]:
    """What a batch's mean of a metric is over; a metric that is not named is over the rows, or pairs."""
    if "labels" in inputs:
        tokens = int((inputs["labels"][:, 1:] != -100).sum())
        return dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), tokens)
    if "completion_mask" in inputs:
        chosen, rejected = (int(half[:, 1:].sum()) for half in inputs["completion_mask"].chunk(2))
        of_chosen = dict.fromkeys(("mean_token_accuracy", "logits/chosen"), chosen)
        return {**of_chosen, "logits/rejected": rejected, "entropy": chosen + rejected}
    return {}


def pooled(values: list[tuple[str, float, int]]) -> dict[str, float]:
    """{metric: of all rows} of (metric, mean of a batch, its weight): means, minima, maxima, a count."""
    found = {}
    for name, value, weight in values:
        found.setdefault(name, []).append((value, weight))
    ends = {"min_reward": min, "max_reward": max, "num_tokens": max}
    return {
        name: ends[name](value for value, _ in of)
        if name in ends
        else sum(value * weight for value, weight in of) / max(sum(weight for _, weight in of), 1)
        for name, of in found.items()
    }


def standard_errors(margins: list[float], names) -> dict[str, float]:
    """`accuracy_se` and the like: what the means of pairs' wins and margins would vary by, were other pairs drawn.

    Args:
        names: of all metrics; those are found of them that are of pairs.
    """
    margins = torch.tensor(margins, dtype=torch.float64)
    values = dict.fromkeys(("margin", "rewards/margins"), margins)
    values |= dict.fromkeys(("accuracy", "rewards/accuracies"), (margins > 0).double())
    known = [name for name in values if name in names and len(margins) > 1]  # of one pair nothing is known
    return {f"{name}_se": (values[name].std() / len(margins) ** 0.5).item() for name in known}


class NamedEvaluation:
    """For TRL's trainers: `eval_hh_accuracy` where several datasets would share `eval_accuracy`, each row, of a token
    mean each token, counted once.

    TRL averages its metrics over batches, so a last batch of one row would weigh as much as a full one, and rows that
    fill up the last batches of several processes would count twice. What compares the rows of a batch with one another
    (DPO's losses `aot` and `sft`, a mixture of experts' `aux_loss`) is the batches' own still, averaged by their rows.
    """

    more_metrics = None  # a function that gives further ones of all datasets, as {name: value}

    def __init__(self, model, args, **kwargs):
        text_config = model.config.get_text_config()
        if getattr(args, "router_aux_loss_coef", None) and not hasattr(text_config, "output_router_logits"):
            raise UserError("--router_aux_loss_coef: the model is no mixture of experts; leave it out")
        super().__init__(model=model, args=args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self._remove_unused_columns(self.eval_dataset[rows] if isinstance(rows, str) else rows, "evaluation")
        args = self.args
        return DataLoader(
            rows,
            batch_sampler=OwnBatches(len(rows), args.eval_batch_size, args.process_index, args.world_size),
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._batches, self._margins = [], []
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        real = dataloader.batch_sampler.real
        metrics = pooled(gather_object([value for batch in self._batches[:real] for value in batch]))
        margins = gather_object([margin for batch in self._margins[:real] for margin in batch])
        metrics |= standard_errors(margins, metrics)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with alone(self.accelerator) as gathered:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found, weights = self._metrics["eval"], weights_of(inputs)
        values = {name: values[-1] for name, values in found.items()}
        values["loss"] = (result[0] if return_outputs else result).item()
        rows = len(inputs["input_ids"])
        self._batches.append([(name, value, weights.get(name, rows)) for name, value in values.items()])
        if gathered:
            chosen, rejected = torch.cat([value.flatten().float() for value in gathered[:2]]).chunk(2)
            self._margins.append((chosen - rejected).tolist())
        found.clear()  # TRL would log them under names of its own
        return result

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.more_metrics and eval_dataset is None:  # of all datasets, not of one of them
            more = {f"{metric_key_prefix}_{name}": value for name, value in self.more_metrics().items()}
            self.log(dict(more))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, more)
            metrics |= more
        best = self.args.metric_for_best_model
        if best and metric_key_prefix == "eval" and f"eval_{best.removeprefix('eval_')}" not in metrics:
            known = [key for key in metrics if not key.endswith(("_runtime", "_per_second", "epoch", "_num_tokens"))]
            hint = "\n  --generate_eval_samples 100 adds the ROUGE of generated answers" if "rouge" in best else ""
            raise UserError(f"--metric_for_best_model {best}: there is {', '.join(known)}{hint}")
        return metrics
