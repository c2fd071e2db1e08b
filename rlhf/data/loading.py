"""`load_datasets`: names in, rows out. Short names are those that prepare_data.py has registered."""

import dataclasses

from rlhf.data.mixing import hold_out, mix
from rlhf.data.names import Name, parse_names
from rlhf.data.rows import SERVES, kind_for, kinds_of
from rlhf.data.sources import DATASETS, Source, on_hub, source_of
from rlhf.user_error import UserError


def load_datasets(
    dataset_names: str,
    task: str,
    *,
    eval_dataset_names: str | None = None,
    validation_split_percentage: float = 5.0,
    max_eval_samples: int | None = None,
    seed: int = 42,
    max_bad_percentage: float = 5.0,
) -> tuple["datasets.Dataset", dict[str, "datasets.Dataset"], dict]:  # noqa: F821 (imported where it is needed)
    """(train, {name: evaluation rows}, report) of `--dataset_names`, for "sft", "preference" or "prompt".

    Columns, each a list of {"role", "content"}: sft has prompt and completion; preference has prompt, chosen, rejected
    (and a number `margin` when every set has it); prompt has prompt and the data's own answer as the text `reference`.
    A text column `dataset` names the source. The report is JSON-able; `describe` makes a table of it.
    """
    if not 0 <= validation_split_percentage < 100:
        raise UserError(f"--validation_split_percentage is {validation_split_percentage:g}; give 0 or more, below 100")
    origins = {}
    train, skipped = resolve(dataset_names, task, origins)
    evaluate, more = resolve(eval_dataset_names, task, origins) if eval_dataset_names else (None, [])
    rows, evals, report = mix(
        train,
        evaluate,
        task,
        percentage=validation_split_percentage,
        max_eval_samples=max_eval_samples,
        seed=seed,
        max_bad_percentage=max_bad_percentage,
    )
    report["notes"] = skipped + [line for line in more if line not in skipped]
    for label, entry in report["evaluation"].items():
        if not entry["kept"]:
            report["notes"].append(
                f"{label}: no prompt was held out; raise --validation_split_percentage to evaluate on it"
            )
    return rows, evals, report


def load_held_out(
    dataset_names: str,
    task: str,
    *,
    whole_files: bool = False,
    validation_split_percentage: float = 5.0,
    max_eval_samples: int | None = None,
    max_bad_percentage: float = 5.0,
) -> tuple[dict[str, "datasets.Dataset"], dict]:  # noqa: F821
    """({name: evaluation rows}, report) of names: what a training run on them would hold out, and nothing to train on.

    With `whole_files` a file without test rows of its own is taken whole. `:0.1` and `#200` sample evaluation rows.

    Raises:
        UserError: if no row is left.
    """
    if not 0 < validation_split_percentage <= 100:
        raise UserError(
            f"--validation_split_percentage is {validation_split_percentage:g}; give more than 0, up to 100"
        )
    wanted, skipped = resolve(dataset_names, task, {})
    evals, report = hold_out(
        wanted,
        task,
        whole_files=whole_files,
        percentage=validation_split_percentage,
        max_eval_samples=max_eval_samples,
        max_bad_percentage=max_bad_percentage,
    )
    if not evals:
        raise UserError(
            f"{dataset_names}: no prompt is held out there to evaluate on\n"
            "  raise --validation_split_percentage, or name a file that was not trained on with --eval_dataset_names"
        )
    report["notes"] = skipped + [
        f"{label}: no prompt was held out" for label, entry in report["evaluation"].items() if not entry["kept"]
    ]
    return evals, report


def check_names(task: str, *names: str | None) -> None:
    """What is wrong with --dataset_names and --eval_dataset_names as far as the hub need not be asked.

    Raises:
        UserError: for an unknown name, a missing or unreadable file, a dataset that does not serve the task.
    """
    for text in names:
        if text is not None and not any(on_hub(name) for name in parse_names(text)):
            resolve(text, task, {})
        for name in parse_names(text) if text is not None else ():
            if not on_hub(name):
                source_of(name)


def resolve(names: str, task: str, origins: dict[str, str]) -> tuple[list[tuple[Source, Name]], list[str]]:
    """The sources that serve the task with what is wanted of them, and a line for each name that does not.

    `origins` keeps the labels apart: two files of one name get two labels, one file named twice a single one.
    """
    usable, skipped = {}, []
    for name in parse_names(names):
        source = source_of(name)
        label, number = source.label, 1
        while origins.setdefault(label, source.origin) != source.origin:
            number += 1
            label = f"{source.label}_{number}"
        if kind_for(task, source.kinds) is None:
            tasks = " and ".join(other for other in SERVES if kind_for(other, source.kinds))
            skipped.append(f"{name.name} serves {tasks}, not {task}: skipped")
        elif label in usable:
            raise UserError(
                f"{name.name} is named twice\nname a dataset once; :0.5 or #5000 says how much of it to take"
            )
        else:
            usable[label] = dataclasses.replace(source, label=label), name
    if not usable:
        able = ", ".join(name for name, entry in DATASETS.items() if kind_for(task, kinds_of(entry.convert)))
        raise UserError(f"{skipped[0].removesuffix(': skipped')}\nfor {task} use one of {able}")
    return list(usable.values()), skipped
