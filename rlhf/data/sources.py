"""Where raw rows come from: registered datasets (the functions of prepare_data.py), local files, folders, the hub."""

import difflib
import functools
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlhf.data.columns import nothing, without
from rlhf.data.files import READERS, find_files, read_file
from rlhf.data.layouts import detect
from rlhf.data.messages import Skip
from rlhf.data.names import Name
from rlhf.data.rows import SERVES, kinds_of
from rlhf.user_error import UserError


@dataclass(frozen=True)
class Source:
    """A dataset before preparation.

    `open(task, side)` with side "train" or "test" gives the identity of the raw rows (another one when they change)
    and a function that iterates over (place, raw row); None without such a side.
    """

    label: str  # in metrics and reports
    origin: str  # which dataset it is, whatever its label
    open: Callable[[str, str], tuple[str, Callable[[], Iterator]] | None]
    kinds: tuple[type, ...]
    convert: Callable
    code: str = ""  # the text of the code that is the dataset's own: editing it renews the cache
    keep: Callable | None = None
    regroup: Callable | None = None
    max_pairs: int | None = None  # at most so many pairs of one prompt, over all rows
    unused: frozenset[str] = frozenset()  # columns and keys that its rows have and that it has no use for
    path: Path | None = None  # of a file or a folder
    ignored: frozenset[str] = frozenset()  # what --ignore_columns names
    most_pairs: int = 10  # of a ranking: nine replies have 36, and would outweigh their neighbours


DATASETS: dict[str, "Entry"] = {}


class Entry(NamedTuple):
    """A registered dataset: the function, where its rows are, and what `dataset` was told."""

    convert: Callable
    path: str | Callable
    where: dict[str, str]  # the arguments of load_dataset; "{subset}" stands for what follows @ on the command line
    splits: dict[str, tuple[str, str | None]]
    known_by: frozenset[str]
    options: dict


def dataset(
    path, splits=("train", "test"), *, keep=None, regroup=None, max_pairs=None, unused="", known_by="", **where
):
    """Registers a dataset under its function's name.

    `path` and `where` are `load_dataset`'s arguments (or `path` is a function of split and subset that yields rows);
    `splits` are its training and evaluation splits, a None among them means to hold out a share of the prompts, and a
    dict gives them by task. `keep(row)` says which raw rows count, `regroup(rows)` gathers rows that belong together,
    `max_pairs` bounds the pairs of one prompt. `unused` names the columns, and keys within them, that the function
    rightly leaves alone; a file with all the columns of `known_by` is read by this function. The function turns a raw
    row into one row, or yields several; its return annotation says of which kinds, and thereby which tasks it serves;
    its docstring is its line in --list.
    """

    def register(convert):
        by_task = splits if isinstance(splits, dict) else dict.fromkeys(SERVES, splits)
        options = {"keep": keep, "regroup": regroup, "max_pairs": max_pairs, "unused": frozenset(unused.split())}
        DATASETS[convert.__name__] = Entry(convert, path, where, by_task, frozenset(known_by.split()), options)
        return convert

    return register


def metric_name(text: str) -> str:
    """Letters, digits and _ only: it becomes part of a metric's name, as in eval_hh_helpful_base_loss."""
    return re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_") or "data"


def with_subset(convert: Callable, name: str, subset: str) -> Callable:
    """The conversion with the subset as its second argument, if it takes one."""
    if "subset" in inspect.signature(convert).parameters:
        return lambda row: convert(row, subset)
    if subset:
        raise UserError(f"{name} has no subsets: type it without @{subset}")
    return convert


def located(rows) -> Iterator[tuple[str, dict]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def hub_rows(rows) -> Iterator[tuple[str, dict]]:
    return located(row for batch in rows.with_format("arrow").iter(500) for row in batch.to_pylist())


def load_from_hub(name: str, path: str, **arguments):
    """`load_dataset`; no network, no such dataset, split or subset, and a script inside become UserErrors."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(path, **arguments)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise UserError(
            f"{name}: cannot load {path} ({given}) from the hub: {str(error).splitlines()[0][:200]}\n"
            "without a network give a local file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error


def registered(entry, subset: str) -> Source:
    """The source of an entry of `DATASETS`."""
    name = entry.convert.__name__
    takes_subset = callable(entry.path) or any("{subset}" in value for value in entry.where.values())
    convert = entry.convert if takes_subset else with_subset(entry.convert, name, subset)
    where = {
        key: value.format(subset=subset) for key, value in entry.where.items() if subset or "{subset}" not in value
    }

    @functools.cache  # asks the hub once, however often it is opened
    def open_side(task, side):
        split = entry.splits[task][side == "test"]
        if split is None:
            return None
        if callable(entry.path):
            made_by = Path(entry.path(split, subset).gi_code.co_filename)  # the file of the generator behind it
            return f"{split} {subset} {made_by.read_text()}", lambda: located(entry.path(split, subset))
        rows = load_from_hub(name, entry.path, split=split, **where)
        return f"{rows._fingerprint} {subset}", lambda: hub_rows(rows)

    label = metric_name(f"{name} {subset}")
    kinds = kinds_of(entry.convert)
    return Source(label, f"{name} {subset}", open_side, kinds, convert, code_of(entry), **entry.options)


def code_of(entry: Entry) -> str:
    """All of the file that the entry is in, for it may call functions beside it."""
    return Path(inspect.getfile(entry.convert)).read_text()


def reader_of(row: dict, place: str, ignored: frozenset) -> tuple[Callable, str, dict]:
    """(conversion, its own code, options) for rows like this: a registered dataset's, or a layout's."""
    row = without(row, ignored, set())
    with_value = {key for key, value in row.items() if not nothing(value)}
    fitting = [entry for entry in DATASETS.values() if entry.known_by and entry.known_by <= with_value]
    if fitting:
        entry = max(fitting, key=lambda entry: len(entry.known_by))
        return entry.convert, code_of(entry), entry.options
    layout = detect(row, place)
    return layout.convert, "", {"regroup": layout.regroup, "unused": layout.unused}


def stem(path: Path) -> str:
    return re.sub(r"(\.(trees|jsonl|json|csv|parquet|gz))+$", "", path.resolve().name)


def local(path: Path, subset: str, ignored: frozenset) -> Source:
    """A file, split by prompt, or a folder, by the names in it; the first row tells the layout."""
    files = find_files(path)

    def rows(side):
        return (located_row for file in files[side] for located_row in read_file(file))

    found = ((place, row) for side in files for place, row in rows(side) if not isinstance(row, Skip))
    place, first = next(found, (None, None))
    if place is None:
        raise UserError(f"{path}: no row in it is readable\nput one JSON object on each line")
    read, code, options = reader_of(first, place, ignored)

    def open_side(task, side):
        if not files[side]:
            return None
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files[side]]
        return json.dumps([stats, subset]), lambda: rows(side)

    origin, convert = f"{path.resolve()} {subset}", with_subset(read, str(path), subset)
    label = metric_name(f"{stem(path)} {subset}")
    return Source(label, origin, open_side, kinds_of(read), convert, code, path=path, **options)


def from_hub(name: str, subset: str, ignored: frozenset) -> Source:
    """Any dataset of the hub: its columns are detected like a file's, its splits by their names."""
    parts = load_from_hub(name, name, **({"name": subset} if subset else {}))
    words = ("valid", "dev", "eval", "test")
    sides = {
        "train": next((split for split in parts if split.startswith("train")), next(iter(parts))),
        "test": next((split for word in words for split in parts if split.startswith(word)), None),
    }
    read, code, options = reader_of(next(iter(parts[sides["train"]]), {}), f"{name} row 1", ignored)

    def open_side(task, side):
        split = sides[side]
        return split and (parts[split]._fingerprint, lambda: hub_rows(parts[split]))

    label, origin = metric_name(f"{name.split('/')[1]} {subset}"), f"{name} {subset}"
    return Source(label, origin, open_side, kinds_of(read), read, code, **options)


def is_path(name: str) -> bool:
    """Whether a name is a file's or a folder's, there or not."""
    there = os.path.exists(os.path.expanduser(name))
    return there or Path(name).suffix in (".gz", *READERS) or name.startswith((".", "/", "~"))


def on_hub(name: Name) -> bool:
    """Whether a name is none of ours and no file, but may be the hub's."""
    known = name.name in DATASETS or is_path(name.name)
    return not known and re.fullmatch(r"[\w.-]+/[\w.-]+", name.name) is not None


def source_of(name: Name, ignored: frozenset = frozenset()) -> Source:
    """The source behind a name: a registered dataset, a file or folder, or a hub id."""
    if name.name in DATASETS:
        return registered(DATASETS[name.name], name.subset)
    if is_path(name.name):
        path = Path(os.path.expanduser(name.name))
        if not os.path.exists(path):
            raise UserError(f"{name.name}: there is no such file or folder")
        return local(path, name.subset, ignored)
    if on_hub(name):
        return from_hub(name.name, name.subset, ignored)
    near = difflib.get_close_matches(name.name, DATASETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"unknown dataset {name.name!r}\n{hint}known are {', '.join(DATASETS)}\n"
        "or give a file (path/to/rows.jsonl), a folder, or a hub id (owner/name)"
    )
