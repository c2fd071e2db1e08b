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
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise UserError("no dataset is named\ntype for example --dataset_names uc:0.1,hh (see prepare_data.py --list)")
    return [parse_name(item) for item in items]


def parse_name(item: str) -> Name:
    if os.path.exists(item):  # unlike Path's, it does not raise for what cannot be a path
        return Name(item)
    name, subset, fraction, count = re.fullmatch(r"(.+?)(?:@([^@:#]*))?(?::([^@:#]*)|#([^@:#]*))?", item).groups()
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
