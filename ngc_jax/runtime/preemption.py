"""Being asked to stop: SIGTERM (a scheduler), SIGHUP (a lost terminal) and the first Ctrl-C.

For: a flag in one process. Not for: many processes (`multihost.py`), or hangs (`watchdog.py`).
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

from ngc_jax.runtime.output import erase, occupy

INTERRUPTED = 128 + signal.SIGINT  # the exit code of Ctrl-C, as shells count
EXIT_CODE = 75  # "try again later" (sysexits.h): neither success (0) nor failure


class Asked(Exception):
    """Raised in the middle of something long, to abandon it."""


def end_at_ctrl_c(told: str = "interrupted") -> None:
    """Makes Ctrl-C end a program at once, with a line and exit code INTERRUPTED, unless ignored."""

    # A KeyboardInterrupt would be lost where it happens to be raised in a destructor or a callback.
    def end(number: int, frame: FrameType | None) -> None:
        if once.acquire(blocking=False):
            erase()
            os.write(2, f"error: {told}\n".encode())  # a print may be what is interrupted
            os._exit(INTERRUPTED)

    # A handler waits for the main thread to be in Python: not while XLA compiles, minutes maybe.
    def watch() -> None:
        while arrived := os.read(ours, 1):
            if arrived[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is end:
                end(signal.SIGINT, None)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        occupy()  # what the pipe must not be
        once, (ours, theirs) = threading.Lock(), os.pipe()
        os.set_blocking(theirs, False)
        signal.signal(signal.SIGINT, end)
        signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        threading.Thread(target=watch, name="interrupted", daemon=True).start()


class Preemption:
    """`with Preemption() as asked: ... if asked: save and leave`.

    A second Ctrl-C interrupts at once. In a thread that is not the main one nothing asks.
    """

    def __enter__(self) -> "Preemption":
        self._asked = False
        self._before: dict[int, Any] = {}
        main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if main else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
