import argparse
import os
import re
import signal
import sys
import tempfile
import textwrap
from pathlib import Path


def visible(text: str) -> str:
    """Text of data as a terminal may show it: what could steer it (escapes, writing direction) as `\\x1b` and such."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda m: repr(m[0])[1:-1], text)


class UserError(Exception):
    """A mistake of the user's: the scripts print it, one to three lines a mistake, and exit with code 2."""


def mistake(error: UserError) -> int:
    """Say what was wrong; the exit code."""
    lines = visible(f"error: {error}").splitlines()
    print("\n".join(line if len(line) < 300 else f"{line[:296]}..." for line in lines), file=sys.stderr)
    return 2


def distance(a: str, b: str) -> int:
    """Letters to change, add, leave out or swap with their neighbour (optimal string alignment)."""
    before, last = [], list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[j] = min(row[j], before[j - 2] + 1)
        before, last = last, row
    return last[-1]


def nearest(name: str, known) -> str | None:
    """The known name that this one is a likely typo of: a wrong guess is worse than none."""
    near = min(known, key=lambda other: distance(name, other), default=None)
    return near if near and distance(name, near) <= min(max(1, len(name) // 5), 3) and len(name) > 2 else None


class ToolParser(argparse.ArgumentParser):
    """argparse made strict: no abbreviations, and a mistake is a UserError."""

    def __init__(self, description: str):
        parts = description.strip().split("\n\n")  # commands, which are indented, stay as they are
        description = "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, 80) for part in parts)
        formatter, usage = argparse.RawDescriptionHelpFormatter, "python %(prog)s [--flag value ...]"
        super().__init__(usage=usage, description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        for name in (arg.split("=")[0] for arg in args if arg.startswith("--")):
            if name not in self._option_string_actions:
                near = nearest(name, self._option_string_actions)
                raise UserError(f"unknown flag {name[:60]}: " + (f"did you mean {near}?" if near else "see --help"))
        return super().parse_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')[:250]}; see --help")


def number(kind=int, least=0, most=float("inf")):
    """A type for argparse: a number of this kind within these ends."""

    def read(text):
        value = kind(text)
        if not least <= value <= most:  # nor is NaN
            ends = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text}: give {ends}")
        return value

    read.__name__ = kind.__name__  # in argparse's message
    return read


def only_local(name: str) -> bool:
    """Whether a model's name can only be a path: a hub id has one slash, and no folder of its owner's is here."""
    slashes = name.count("/")
    beside = slashes == 1 and os.path.isdir(os.path.dirname(name))
    return name.startswith((".", "/", "~")) or slashes > 1 or name.endswith(("/", ".py")) or beside


def missing_path(name: str, value: str | None) -> None:
    """Raises a UserError for what can only be a path, and is not there."""
    path = re.sub(r"(\.py):\w+$", r"\1", value or "")
    if path.lower() in ("", "true", "false") or os.path.exists(os.path.expanduser(path)):
        return
    if only_local(path) or "resume" in name:
        raise UserError(f"--{name} {value[:150]}: there is no such file or folder")


def check_folder(flag: str, folder) -> None:
    """Raises a UserError where a folder could not be written; nothing is left behind."""
    path = Path(folder).expanduser()
    there = next((p for p in (path, *path.absolute().parents) if os.path.lexists(p)), Path("/"))
    if not there.is_dir():
        where = "it" if there == path else f"{str(there)[:100]}, in which it would lie,"
        raise UserError(f"{flag}: cannot write {str(folder)[:120]}: {where} is a file")
    try:  # to ask for the permission would not tell of a read-only or foreign disk, nor root
        os.rmdir(tempfile.mkdtemp(prefix=".writable-", dir=there))
    except OSError as error:
        raise UserError(f"{flag}: cannot write {str(folder)[:120]}: {error.strerror}") from error


def end_quietly() -> None:
    """Let a closed pipe, as after `| head`, end the process: there is nothing to save."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def run_tool(main, make_parser) -> None:
    """The guard of a command that trains nothing: argparse's parser, and a mistake's exit code."""
    end_quietly()
    try:
        main(make_parser().parse_args())
    except UserError as error:
        sys.exit(mistake(error))
    except KeyboardInterrupt as stopped:
        print(f"\nstopped: {str(stopped) or 'nothing was written'}", file=sys.stderr)
        sys.exit(130)
