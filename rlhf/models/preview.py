"""What a stage will see of a dataset: rows as the template renders them, the loss in colour, lengths in numbers."""

from itertools import groupby

from rlhf.models.rendering import Unrenderable, encode_demonstration, encode_preference, encode_prompt, tokenize
from rlhf.user_error import visible

ENCODERS = {"sft": encode_demonstration, "preference": encode_preference, "prompt": encode_prompt}
CONTEXT, LOSS, REJECTED, PLAIN = "\033[2m", "\033[32m", "\033[31m", "\033[0m"


def limits(task: str, max_length: int, max_prompt_length: int | None) -> dict:
    """The encoder's keyword arguments; a prompt alone may fill what there is."""
    if task == "prompt":
        return {"max_prompt_length": max_prompt_length or max_length}
    return {"max_length": max_length, "max_prompt_length": max_prompt_length}


def show_row(row: dict, task: str, tokenizer, **limits) -> str:
    """One row as it will be trained on: context dim, what carries loss (or is chosen) green, what is rejected red."""

    def paint(colour, ids):
        return f"{colour}{visible(tokenizer.decode(ids))}{PLAIN}" if ids else ""

    try:
        encoded = ENCODERS[task](row, tokenizer, **limits)
    except Unrenderable as reason:
        return f"--- {row['dataset']}, dropped: {reason}"
    if task == "sft":
        pairs = zip(encoded["input_ids"], encoded["labels"], strict=True)
        runs = groupby(pairs, key=lambda pair: pair[1] != -100)
        text = "".join(paint(LOSS if trained else CONTEXT, [i for i, _ in run]) for trained, run in runs)
        size = f"{len(encoded['input_ids'])} tokens, {sum(label != -100 for label in encoded['labels'])} with loss"
    else:
        text = paint(CONTEXT, encoded["prompt_ids"])
        size = f"{len(encoded['prompt_ids'])} tokens"
        for side, colour in (("chosen_ids", LOSS), ("rejected_ids", REJECTED)) if task == "preference" else ():
            text += f"\n{side.removesuffix('_ids')}:{paint(colour, encoded[side])}"
            size += f" + {len(encoded[side])} {side.removesuffix('_ids')}"
    return f"--- {row['dataset']}, {size}{', shortened to fit' if encoded['shortened'] else ''}\n{text}"


def measure(rows, task: str, tokenizer, **limits) -> tuple[dict, str]:
    """The counts of `rendering.tokenize`, and a table of length percentiles in tokens."""
    import numpy

    encoded, counts = tokenize(rows, ENCODERS[task], tokenizer, "train", **limits)
    at = (50, 90, 95, 99, 100)
    lines = [f"{'tokens a row':<28}" + "".join(f"{'longest' if p == 100 else f'{p}%':>10}" for p in at)]
    for column in (name for name in encoded.column_names if name.endswith("ids")):
        lengths = numpy.percentile([len(ids) for ids in encoded[column]], at)
        lines.append(f"{column:<28}" + "".join(f"{length:>10.0f}" for length in lengths))
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in counts["dropped"].items())
    lines.append(f"{counts['kept']} rows can be trained on, {counts['shortened']} of them shortened to fit{dropped}")
    return counts, "\n".join(lines)
