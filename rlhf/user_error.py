import sys


class UserError(Exception):
    """A mistake of the user's: the scripts print it as one to three lines and exit with code 2."""


def run_tool(main, make_parser) -> None:
    """The guard of a command that trains nothing: argparse's parser, and a mistake's exit code."""
    try:
        main(make_parser().parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
