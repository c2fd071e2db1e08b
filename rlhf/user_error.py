import argparse
import os
import sys


class UserError(Exception):
    """A mistake of the user's: the scripts print it as one to three lines and exit with code 2."""


def mistake(error: UserError) -> int:
    """Say what was wrong, once a machine whatever the number of processes; the exit code."""
    if int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", 0))) == 0:
        print(f"error: {error}", file=sys.stderr)
    return 2


class ToolParser(argparse.ArgumentParser):
    """argparse made strict: no abbreviations, and a mistake is a UserError."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')[:250]}; --help lists all flags")


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


def run_tool(main, make_parser) -> None:
    """The guard of a command that trains nothing: argparse's parser, and a mistake's exit code."""
    try:
        main(make_parser().parse_args())
    except UserError as error:
        sys.exit(mistake(error))
