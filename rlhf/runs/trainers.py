"""Trainers whose runs can be trusted: TRL's, for rows that are tokenised already, and any other by `checked`."""

import math
from functools import partial

import torch
from peft import PeftModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from rlhf.runs.last_batch import EachRowOnce
from rlhf.runs.named_evaluation import NamedEvaluation
from rlhf.runs.resuming import Resumable
from rlhf.runs.soundness import Sound


def checked(trainer_class: type) -> type:
    """A `transformers.Trainer` class whose runs are resumed exactly, and stop at what is not finite."""
    return type(f"Checked{trainer_class.__name__}", (Resumable, Sound, trainer_class), {})


class CheckedSFTTrainer(EachRowOnce, NamedEvaluation, checked(SFTTrainer)):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = "real_rows" in inputs or (inputs["labels"] != -100).any()
        assert labels, "a batch without a single label: nothing would be learned from it"
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class PairLengths:
    """--train_sampling_strategy group_by_length for pairs, which have no `input_ids` to measure."""

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [
            len(row.get("prompt_ids", ())) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows
        ]
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=lengths)


class CheckedRewardTrainer(PairLengths, EachRowOnce, NamedEvaluation, checked(RewardTrainer)):
    pass


def score_answers_only(collate, rows: list[dict]) -> dict:
    """A batch of DPO's in which what the user says between answers does not count."""
    batch = collate(rows)
    sides = [(len(row["prompt_ids"]), row[side]) for side in ("chosen_mask", "rejected_mask") for row in rows]
    for completion, (start, mask) in zip(batch["completion_mask"], sides, strict=True):
        completion[start : start + len(mask)] = torch.tensor(mask)
    return batch


class CheckedDPOTrainer(PairLengths, EachRowOnce, NamedEvaluation, checked(DPOTrainer)):
    checked = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = partial(score_answers_only, self.data_collator)
        if isinstance(self.model, PeftModel):  # without TRL's frozen copy of the start, which a next run makes anew
            self.model.save_pretrained = partial(self.model.save_pretrained, selected_adapters=["default"])

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, "chosen_mask", "rejected_mask"]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.checked and self.model.training and self.state.global_step == 0:
            self.checked = True
            # before the first update policy and reference are the same, every implicit reward 0 and the loss ln 2
            tolerance = 1e-3 if self.model.dtype.itemsize == 4 and not (self.args.bf16 or self.args.fp16) else 0.05
            margin = self._metrics["train"]["rewards/margins"][-1]
            assert abs(margin) < tolerance, f"policy and reference differ before the first step: margin {margin}"
            if self.args.loss_type == ["sigmoid"] and not (
                self.args.label_smoothing or self.args.use_weighting or self.aux_loss_enabled
            ):
                loss = (result[0] if return_outputs else result).item()
                assert abs(loss - math.log(2)) < tolerance, f"the first DPO loss is {loss}, not ln 2"
        return result
