"""What the libraries' parsers know, as text: `make flags` writes flags.json, which is read before they are imported.

python -m rlhf.runs.description sft_training reward_modeling dpo_training ppo_training
"""

import argparse
import importlib
import inspect
import json
import sys
import types
import typing
from enum import Enum
from pathlib import Path

PATH = Path(__file__).with_name("flags.json")
KINDS = {int: "int", float: "float"}


def parts(hint) -> set:
    """The types in a type hint, without what they hold: {int, NoneType} of `int | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(parts(part) for part in typing.get_args(hint)))
    return {typing.get_origin(hint) or hint}


def describe(dataclass_type) -> dict[str, dict]:
    """{flag: what its argparse action and its type hint say} of a dataclass, as transformers' own parser sees it."""
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool

    hints, found = typing.get_type_hints(dataclass_type), {}
    for action in HfArgumentParser(dataclass_type)._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._StoreFalseAction):  # --no_x
            found[action.dest]["no"] = True
            continue
        kinds = parts(hints[action.dest])
        default = action.default.value if isinstance(action.default, Enum) else action.default
        spelt = [option[2:] for option in action.option_strings if "-" not in option[2:]]
        about = {
            "kind": "bool" if action.type is string_to_bool else "json" if dict in kinds else KINDS.get(action.type),
            "list": "several" if action.nargs == "+" else "one or several" if list in kinds else None,
            "optional": type(None) in kinds,
            "choices": list(action.choices or ()),
            "default": default,
            "aliases": spelt[1:],
            "help": " ".join((action.help or "").split()),
        }
        found[spelt[0]] = {k: v for k, v in about.items() if v is not None and v is not False and v != []}
    return found


def schedulers() -> dict[str, list[str]]:
    """{learning rate schedule: the names that its --lr_scheduler_kwargs may have}."""
    from torch.optim.lr_scheduler import ReduceLROnPlateau
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR

    classes = {"reduce_lr_on_plateau": ReduceLROnPlateau, "greedy": GreedyLR}  # behind functions of any keyword
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    found = {}
    for name, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        found[name.value] = sorted(set(inspect.signature(classes.get(name.value, function)).parameters) - ours)
    return found


def text(scripts: list[str]) -> str:
    """flags.json: one line a flag, with the scripts that know it so."""
    flags = {}
    for script in scripts:
        for dataclass_type in importlib.import_module(script).make_parser().classes():
            of_ours = [c for c in dataclass_type.__mro__ if not c.__module__.startswith(("trl.", "transformers."))]
            ours = set().union(*(vars(c).get("__annotations__", {}) for c in of_ours))
            for name, about in describe(dataclass_type).items():
                entry = {"name": name, **about, **({"ours": True} if name in ours else {})}
                flags.setdefault(json.dumps(entry), []).append(script)
    lines = [f'{entry[:-1]}, "in": {json.dumps(known_by)}}}' for entry, known_by in flags.items()]
    return f'{{"schedulers": {json.dumps(schedulers())},\n"flags": [\n' + ",\n".join(lines) + "\n]}\n"


def read(script: str) -> tuple[dict[str, dict], dict[str, list[str]], dict[str, list[str]]]:
    """({flag of this script: what is known of it}, {flag of the others: their scripts}, the schedules' arguments)."""
    described, flags, others = json.loads(PATH.read_text(encoding="utf-8")), {}, {}
    for flag in described["flags"]:
        if script in flag["in"]:
            flags[flag["name"]] = flag
        else:
            others.setdefault(flag["name"], []).extend(flag["in"])
    return flags, others, described["schedulers"]


if __name__ == "__main__":
    sys.path.insert(0, ".")
    PATH.write_text(text(sys.argv[1:]), encoding="utf-8")
