"""What a stage will see of a dataset: rows as the template renders them, the loss in colour, lengths in numbers."""

from itertools import groupby

from rlhf.models.rendering import Unrenderable, encode_demonstrations, encode_preference, encode_prompt
from rlhf.models.tokenizing import tokenize
from rlhf.user_error import visible

ENCODERS = {"sft": encode_demonstrations, "preference": encode_preference, "prompt": encode_prompt}
CONTEXT, LOSS, REJECTED, PLAIN = "\033[2m", "\033[32m", "\033[31m", "\033[0m"


def limits(task: str, max_length: int, max_prompt_length: int | None) -> dict:
    """The encoder's keyword arguments; a prompt alone may fill what there is."""
    if task == "prompt":
        return {"max_prompt_length": max_prompt_length or max_length}
    return {"max_length": max_length, "max_prompt_length": max_prompt_length}


def show_row(row: dict, task: str, tokenizer, **limits) -> str:
    """One row as it will be trained on, in each of its examples: context dim, what carries loss (or is chosen) green,
    what is rejected red."""
    try:
        encoded = ENCODERS[task](row, tokenizer, **limits)
    except Unrenderable as reason:
        return f"--- {row['dataset']}, dropped: {reason}"
    examples = encoded if isinstance(encoded, list) else [encoded]
    return "\n".join(show_example(row, task, tokenizer, example) for example in examples)


def show_example(row: dict, task: str, tokenizer, encoded: dict) -> str:
    def paint(ids, mask, colour=LOSS):
        runs = groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
        return "".join(
            f"{colour if trained else CONTEXT}{visible(tokenizer.decode([i for i, _ in run]))}{PLAIN}"
            for trained, run in runs
        )

    if task == "sft":
        mask = [label != -100 for label in encoded["labels"]]
        text = paint(encoded["input_ids"], mask)
        size = f"{len(mask)} tokens, {sum(mask)} with loss"
    else:
        text = paint(encoded["prompt_ids"], [0] * len(encoded["prompt_ids"]))
        size = f"{len(encoded['prompt_ids'])} tokens"
        for side, colour in (("chosen", LOSS), ("rejected", REJECTED)) if task == "preference" else ():
            text += f"\n{side}:{paint(encoded[f'{side}_ids'], encoded[f'{side}_mask'], colour)}"
            size += f" + {len(encoded[f'{side}_ids'])} {side}"
    return f"--- {row['dataset']}, {size}{', shortened to fit' if encoded['shortened'] else ''}\n{text}"


def measure(rows, task: str, tokenizer, **limits) -> tuple[dict, str]:
    """The counts of `tokenize`, and a table of length percentiles in tokens."""
    import numpy

    encoded, counts = tokenize(rows, ENCODERS[task], tokenizer, **limits)
    at = (50, 90, 95, 99, 100)
    lines = [f"{'tokens a row':<28}" + "".join(f"{'longest' if p == 100 else f'{p}%':>10}" for p in at)]
    for column in (name for name in encoded.column_names if name.endswith("ids")):
        lengths = numpy.percentile([len(ids) for ids in encoded[column]], at)
        lines.append(f"{column:<28}" + "".join(f"{length:>10.0f}" for length in lengths))
    dropped = "".join(f", {count} dropped: {reason}" for reason, count in counts["dropped"].items())
    examples = f" in {counts['examples']} examples" if counts["examples"] != counts["kept"] else ""
    lines.append(
        f"{counts['kept']} rows can be trained on{examples}, {counts['shortened']} of them shortened to fit{dropped}"
    )
    return counts, "\n".join(lines)
