import re
import sys


def visible(text: str) -> str:
    """Text of data as a terminal may show it: what could steer it (escapes, writing direction) as `\\x1b` and such."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda m: repr(m[0])[1:-1], text)


class UserError(Exception):
    """A mistake of the user's: the scripts print it as one to three lines and exit with code 2."""


def run_tool(main, make_parser) -> None:
    """The guard of a command that trains nothing: argparse's parser, and a mistake's exit code."""
    try:
        main(make_parser().parse_args())
    except UserError as error:
        print(f"error: {visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print(f"\nstopped: {str(stopped) or 'nothing was written'}", file=sys.stderr)
        sys.exit(130)
