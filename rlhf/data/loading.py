"""`load_datasets`: names in, rows out. Short names are those that prepare_data.py has registered."""

import dataclasses

from rlhf.data.mixing import hold_out, mix
from rlhf.data.names import parse_names
from rlhf.data.rows import SERVES, kind_for, kinds_of
from rlhf.data.sources import DATASETS, Source, metric_name, on_hub, source_of
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
    ignore_columns: str | None = None,
    max_pairs_per_prompt: int | None = None,
) -> tuple["datasets.Dataset", dict[str, "datasets.Dataset"], dict]:  # noqa: F821 (imported where it is needed)
    """(train, {name: evaluation rows}, report) of `--dataset_names`, for "sft", "preference" or "prompt".

    Columns, each a list of {"role", "content"}: sft has prompt and completion; preference has prompt, chosen, rejected
    (and a number `margin` when every set has it); prompt has prompt and the data's own answer as the text `reference`.
    A text column `dataset` names the source. The report is JSON-able; `describe` makes a table of it.
    """
    if not 0 <= validation_split_percentage < 100:
        raise UserError(f"--validation_split_percentage is {validation_split_percentage:g}; give 0 or more, below 100")
    names = [dataset_names, eval_dataset_names]
    (train, evaluate), notes = resolve(names, task, ignore_columns, max_pairs_per_prompt)
    rows, evals, report = mix(
        train,
        evaluate,
        task,
        percentage=validation_split_percentage,
        max_eval_samples=max_eval_samples,
        seed=seed,
        max_bad_percentage=max_bad_percentage,
    )
    refuse_unknown(ignore_columns, report)
    report["notes"] = notes + report["notes"]
    return rows, evals, report


def load_held_out(
    dataset_names: str,
    task: str,
    *,
    whole_files: bool = False,
    validation_split_percentage: float = 5.0,
    max_eval_samples: int | None = None,
    max_bad_percentage: float = 5.0,
    ignore_columns: str | None = None,
    max_pairs_per_prompt: int | None = None,
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
    (wanted,), notes = resolve([dataset_names], task, ignore_columns, max_pairs_per_prompt)
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
    refuse_unknown(ignore_columns, report)
    report["notes"] = notes + report["notes"]
    return evals, report


def check_names(
    task: str, dataset_names: str | None, eval_dataset_names: str | None = None, ignore_columns: str | None = None
) -> None:
    """What is wrong with --dataset_names and --eval_dataset_names as far as the hub need not be asked.

    Raises:
        UserError: for an unknown name, a missing or unreadable file, a dataset that does not serve the task.
    """
    for names in (dataset_names, eval_dataset_names):
        if names is None:
            continue
        found = parse_names(names)
        here = [name for name in found if not on_hub(name)]
        if here == found:
            resolve([names], task, ignore_columns, None)
        else:
            for name in here:
                source_of(name, names_in(ignore_columns))


def resolve(lists: list[str | None], task: str, ignore_columns: str | None, max_pairs_per_prompt: int | None):
    """For each comma list the sources that serve the task with what is wanted of them; and lines for the table.

    One dataset has one label in all lists; different ones that share a label get their folder's name before it.
    """
    if max_pairs_per_prompt is not None and max_pairs_per_prompt < 1:
        raise UserError(f"--max_pairs_per_prompt is {max_pairs_per_prompt}; give 1 or more")
    ignored = names_in(ignore_columns)
    named = [[(source_of(name, ignored), name) for name in parse_names(names)] if names else [] for names in lists]
    labels, notes = labels_apart({source.origin: source for pairs in named for source, _ in pairs})
    results = []
    for pairs in named:
        usable = {}
        for source, name in pairs:
            if kind_for(task, source.kinds) is None:
                tasks = " and ".join(other for other in SERVES if kind_for(other, source.kinds))
                notes += [f"{name.name} serves {tasks}, not {task}: skipped"]
            elif source.origin in usable:
                raise UserError(
                    f"{name.name} is named twice\nname a dataset once; :0.5 or #5000 says how much of it to take"
                )
            else:
                ways = {"label": labels[source.origin], "ignored": ignored}
                if (most := max_pairs_per_prompt) is not None:
                    ways |= {"most_pairs": most, "max_pairs": min(most, source.max_pairs or most)}
                usable[source.origin] = dataclasses.replace(source, **ways), name
        if pairs and not usable:
            able = ", ".join(name for name, entry in DATASETS.items() if kind_for(task, kinds_of(entry.convert)))
            raise UserError(f"{notes[-1].removesuffix(': skipped')}\nfor {task} use one of {able}")
        results.append(list(usable.values()) or None)
    return results, list(dict.fromkeys(notes))


def labels_apart(sources: dict[str, Source]) -> tuple[dict[str, str], list[str]]:
    """A label of its own for each origin, and a line for each that had to get another than its short one."""
    labels, depth = {origin: source.label for origin, source in sources.items()}, 0
    clash = {}
    while depth < 9 and (clash := {origin for origin in labels if list(labels.values()).count(labels[origin]) > 1}):
        for origin in clash:
            if (path := sources[origin].path) is not None:
                folders = path.resolve().parent.parts[1:][-1 - depth :]
                labels[origin] = metric_name(" ".join([*folders, sources[origin].label]))
        depth += 1
    for origin in clash:  # names that differ in their signs alone
        others, number = [label for other, label in labels.items() if other != origin], 1
        while labels[origin] in others:
            number += 1
            labels[origin] = f"{labels[origin].removesuffix(f'_{number - 1}')}_{number}"
    moved = [origin for origin in labels if labels[origin] != sources[origin].label]
    return labels, [f"{labels[origin]}: {sources[origin].path or origin.strip()}" for origin in moved]


def names_in(ignore_columns: str | None) -> frozenset[str]:
    return frozenset(name.strip() for name in (ignore_columns or "").split(",") if name.strip())


def refuse_unknown(ignore_columns: str | None, report: dict):
    """Raises a UserError for a column to ignore that no row has: a slip there would leave another one in use."""
    parts = [*report["datasets"].values(), *report["evaluation"].values()]
    unknown = names_in(ignore_columns).difference(*(entry["unused"] for entry in parts))
    if unknown:
        raise UserError(f"--ignore_columns {','.join(sorted(unknown))}: no row has a column or key of that name")
