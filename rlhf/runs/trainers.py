"""Trainers whose runs can be trusted: TRL's, for rows that are tokenised already, and any other by `checked`."""

import math
from functools import partial

import torch
from peft import PeftModel
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from rlhf.models.lean import use_lean
from rlhf.models.rollout import right_padded
from rlhf.runs.engine import Engine
from rlhf.runs.last_batch import EachRowOnce
from rlhf.runs.named_evaluation import NamedEvaluation
from rlhf.runs.resuming import Resumable
from rlhf.runs.soundness import Sound


def checked(trainer_class: type) -> type:
    """A `transformers.Trainer` class whose runs are resumed exactly, stop at what is not finite, and save it all."""
    return type(f"Checked{trainer_class.__name__}", (Resumable, Sound, Engine, trainer_class), {})


class GroupedByLength(LengthGroupedSampler):
    """An order that follows from seed and epoch alone: the same on all processes, and when a run goes on."""

    def __init__(self, size: int, lengths: list[int], seed: int):
        super().__init__(size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class ByLength:
    """--train_sampling_strategy group_by_length, in groups of a step's rows; of pairs the longer answer counts."""

    def _get_train_sampler(self, train_dataset=None):
        args = self.args
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        answers = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
        lengths = [len(row.get("prompt_ids", ())) + max(len(row[name]) for name in answers) for row in rows]
        size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return GroupedByLength(size, lengths, args.seed if args.data_seed is None else args.data_seed)


class Lean:
    """What TRL's trainers compute, for less time and memory (models/lean.py); by `pad_rows` as TRL does it."""

    def __init__(self, *args, pad_rows: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        unfit = [
            getattr(args, flag, False) for flag in ("torch_compile", "use_liger_kernel", "packing", "padding_free")
        ]
        unfit += [self.is_fsdp_enabled, self.is_deepspeed_enabled, getattr(self, "aux_loss_enabled", False)]
        unfit += [args.neftune_noise_alpha is not None]  # the noise is scaled by a row's length
        if pad_rows or any(unfit):
            return
        for model in filter(None, (self.model, getattr(self, "ref_model", None))):
            use_lean(model, args.device, self.accelerator.mixed_precision != "no" or model.dtype.itemsize < 4)


class CheckedSFTTrainer(Lean, ByLength, EachRowOnce, NamedEvaluation, checked(SFTTrainer)):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = "real_rows" in inputs or (inputs["labels"] != -100).any()
        assert labels, "a batch without a single label: nothing would be learned from it"
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


class CheckedRewardTrainer(Lean, ByLength, EachRowOnce, NamedEvaluation, checked(RewardTrainer)):
    @torch.no_grad()
    def score(self, rows: list[list[int]]) -> torch.Tensor:
        """The scores of rows of tokens by the model in training, (rows,) on all processes: each reads its share."""
        processes, size = self.args.world_size, self.args.per_device_eval_batch_size
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of a length need little padding
        order += order[-1:] * (-len(rows) % processes)  # so that all call the model as often, which may be in parts
        mine, scores = order[self.args.process_index :: processes], []
        self.model.eval()
        for i in range(0, len(mine), size):
            batch = [rows[j] for j in mine[i : i + size]]
            ids, mask = right_padded(batch, self.processing_class.pad_token_id, self.args.device)
            scores.append(self.model_wrapped(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].float())
        found = self.accelerator.gather(torch.cat(scores)).view(processes, -1).T.flatten().cpu()
        return torch.empty(len(rows)).index_copy_(0, torch.tensor(order), found)


def score_answers_only(collate, rows: list[dict]) -> dict:
    """A batch of DPO's in which what the user says between answers does not count."""
    batch = collate(rows)
    sides = [(len(row["prompt_ids"]), row[side]) for side in ("chosen_mask", "rejected_mask") for row in rows]
    for completion, (start, mask) in zip(batch["completion_mask"], sides, strict=True):
        completion[start : start + len(mask)] = torch.tensor(mask)
    return batch


class CheckedDPOTrainer(Lean, ByLength, EachRowOnce, NamedEvaluation, checked(DPOTrainer)):
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
                self.args.label_smoothing or self.args.use_weighting or getattr(self, "aux_loss_enabled", False)
            ):
                loss = (result[0] if return_outputs else result).item()
                assert abs(loss - math.log(2)) < tolerance, f"the first DPO loss is {loss}, not ln 2"
        return result
