"""The grammar of --dataset_names: `name[@subset][:fraction|#count]`, separated by commas."""

import os
import re
from typing import NamedTuple

from rlhf.user_error import UserError


class Name(NamedTuple):
    """One item of --dataset_names: `name[@subset][:fraction|#count]`."""

    name: str
    subset: str = ""
    fraction: float | None = None
    count: int | None = None


def parse_names(text: str) -> list[Name]:
    """The items of a comma list; a UserError says what a fraction and a count look like."""
    items, parts = [], text.split(",")
    while parts:  # one part, or more where a file's name has their commas
        joined = {size: file_in(",".join(parts[:size]).strip()) or "" for size in range(len(parts), 1, -1)}
        size = next((size for size, file in joined.items() if file.count(",") == size - 1), 1)
        items, parts = [*items, ",".join(parts[:size]).strip()], parts[size:]
    items = [item for item in items if item]
    if not items:
        raise UserError("no dataset is named\ntype for example --dataset_names uc:0.1,hh (see prepare_data.py --list)")
    return [parse_name(item) for item in items]


def file_in(item: str) -> str | None:
    """The longest beginning of an item that is a file or folder, up to its end or one of `@:#`."""
    ends = [len(item), *(match.start() for match in reversed(list(re.finditer("[@:#]", item))))]
    # unlike Path's, it does not raise for what cannot be a path
    return next((item[:end] for end in ends if end and os.path.exists(os.path.expanduser(item[:end]))), None)


def parse_name(item: str) -> Name:
    file = file_in(item)
    if file == item:
        return Name(item)
    name = f"({re.escape(file)}|.+?)" if file else "(.+?)"
    grammar = re.fullmatch(rf"{name}(?:@([^@:#]*))?(?::([^@:#]*)|#([^@:#]*))?", item, re.DOTALL)
    name, subset, fraction, count = grammar.groups()
    try:
        if subset == "":
            raise ValueError("@ without the name of a subset")
        if fraction is not None and not 0 < float(fraction) <= 1:
            raise ValueError(f"the fraction {fraction} is not between 0 and 1")
        if count is not None and (float(count) < 1 or not float(count).is_integer()):
            raise ValueError(f"the count {count} is not a whole number from 1 up")
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{item!r}: {error}\ntype {name}:0.1 for a tenth of its rows, {name}#20000 for at most so many"
        ) from error
    return Name(name, subset or "", fraction and float(fraction), count and int(float(count)))
