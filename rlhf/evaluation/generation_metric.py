"""ROUGE of answers that were really generated, as a metric of training: to choose a checkpoint by, and when to stop.

Teacher-forced argmax, which is often taken for this, sees the reference's words before each of its own.
"""

import torch
from accelerate.utils import gather_object
from transformers.integrations import is_deepspeed_zero3_enabled

from rlhf.evaluation.statistics import mean, rouge
from rlhf.models.rollout import generate, stop_ids
from rlhf.user_error import UserError


class GeneratedRouge:
    """`rouge1`, `rouge2`, `rougeL` and `rouge_avg` of what a trainer's policy generates, each time it is called.

    The first answers of `samples` held-out rows, evenly from all datasets, are generated greedily, up to `length`
    tokens, and compared with the data's; F1 in [0, 1] by the rouge-score package, an empty answer counting 0.

    Raises:
        UserError: if the weights are spread over processes, or no prompt leaves room for the answer.
    """

    def __init__(self, trainer, samples: int, length: int):
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise UserError(
                "--generate_eval_samples needs whole weights on each device, which FSDP and ZeRO-3 do not have"
            )
        positions = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        rows, share = [], -(-samples // len(trainer.eval_dataset))
        for dataset in trainer.eval_dataset.values():
            fitting = [row for row in map(first_answer, dataset) if len(row[0]) + length <= positions]
            rows += fitting[:: max(1, len(fitting) // share)][:share]
        if not rows:
            raise UserError(f"--generate_eval_length {length} leaves no held-out prompt room in {positions} positions")
        self.trainer, self.rows, self.length = trainer, rows[:samples], length

    def __call__(self) -> dict[str, float]:
        """The means over all rows, of which each process answers its share."""
        trainer, tokenizer = self.trainer, self.trainer.processing_class
        policy = trainer.accelerator.unwrap_model(trainer.model)
        mine = self.rows[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
        scores, size = [], trainer.args.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            prompts, references = zip(*mine[start : start + size], strict=True)
            noise = torch.zeros(len(prompts), self.length)
            options = {"stop_ids": stop_ids(policy, tokenizer), "pad_id": tokenizer.pad_token_id, "temperature": 0}
            with trainer.accelerator.autocast():  # in the precision that is trained in
                tokens = generate(policy, prompts, noise, **options)[0]
            found = rouge(*(tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (tokens, references)))
            scores += [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
        scores = gather_object(scores)
        return {name: mean(score[name] for score in scores) for name in scores[0]}


def first_answer(row) -> tuple[list[int], list[int]]:
    """The prompt of an encoded demonstration, and its first answer."""
    labels = row["labels"]
    start = next(i for i, label in enumerate(labels) if label != -100)
    stop = next((i for i in range(start, len(labels)) if labels[i] == -100), len(labels))
    return row["input_ids"][:start], row["input_ids"][start:stop]
