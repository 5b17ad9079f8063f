"""The one error that a user causes and can mend, and how a command ends with an error: one line,
and its exit code.
"""

import sys
from typing import NoReturn


class UserError(ValueError):
    """Something given by the user is wrong; the message names it, its value, and a value that would
    work.
    """


def say(error: object) -> None:
    """Print an error as a single line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def fail(code: int, error: object) -> NoReturn:
    """End this command, with the error as a single line."""
    say(error)
    sys.exit(code)
