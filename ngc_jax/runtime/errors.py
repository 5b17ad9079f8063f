"""The error that a user causes and can mend, and how a command ends: one line and an exit code.

For: all messages to users. Not for: errors of the program, which keep their traceback.
"""

import sys
from typing import NoReturn


class UserError(ValueError):
    """What the user gave is wrong; the message names it, its value, and a value that works."""


def say(error: object) -> None:
    """Prints an error as a single line."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def fail(code: int, error: object) -> NoReturn:
    """Ends this command, with the error as a single line."""
    say(error)
    sys.exit(code)
