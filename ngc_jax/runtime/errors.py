"""The error that a user causes and can mend, and how a command ends: one line and an exit code.

For: all messages to users. Not for: errors of the program, which keep their traceback.
"""

import contextlib
import os
import sys
import threading
import traceback
from typing import NoReturn

from ngc_jax.runtime import output


class UserError(ValueError):
    """What the user gave is wrong; the message names it, its value, and a value that works."""


def plain(error: object) -> str:
    """A message as one line, with control characters escaped: a file's name may have some."""
    words = " ".join(str(error).split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in words)


def say(error: object) -> None:
    """Prints an error as a single line."""
    output.now("")  # nothing is waited for any more
    with contextlib.suppress(OSError):  # the terminal is gone
        print(f"error: {plain(error)}", file=sys.stderr, flush=True)


def of_machine(error: BaseException) -> str:
    """What to say of devices that are not here, or have no room; "" of another error.

    Also of a value in the environment that jax refuses when it is imported.
    """
    if isinstance(error, ValueError):
        return f"the environment: {error}" * ("for JAX flag" in str(error))
    if isinstance(error, MemoryError) or str(error).startswith("RESOURCE_EXHAUSTED"):
        why = (str(error).splitlines() or ["of the process"])[0]
        return f"out of memory: ask for less, such as a smaller batch, context or width ({why})"
    at = traceback.extract_tb(error.__traceback__)[-1:]
    silent = isinstance(error, AssertionError) and at and at[0].name == "backends"  # of jax
    if not silent and not str(error).startswith("Unable to initialize backend"):
        return ""
    asked = os.environ.get("JAX_PLATFORMS", "")
    why = f" ({error})" if str(error) else ""
    return f"JAX_PLATFORMS={asked}: must name devices that are here, for instance cpu{why}"


def end(code: int, error: object = None) -> None:
    """Ends the process at once, also where threads of libraries live on."""
    if error:
        say(error)
    os._exit(code)


def end_soon(code: int, seconds: float = 8.0, error: object = None) -> threading.Timer:
    """Ends the process after so long, unless the timer that this returns is cancelled."""
    timer = threading.Timer(seconds, end, [code, error])
    timer.daemon = True
    timer.start()
    return timer


def fail(code: int, error: object) -> NoReturn:
    """Ends this command, with the error as a single line."""
    say(error)
    sys.exit(code)
