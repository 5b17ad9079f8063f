"""What a command prints: to pipes that break, to closed streams, in letters that a terminal lacks.

For: `begin`, first in every command; `doing`, which says what a wait is for: on a terminal how long
and how far, in the log of a run once. Not for: what is printed, or programs that import this.
"""

import contextlib
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

SILENT = 1.5  # seconds after which it is said that the command is at work
ERASE = "\r\x1b[K"
BAR = 20  # characters
_doing = "loading"  # the libraries
_come = 0.0  # how much of it is done, of 1
_since = _written = time.monotonic()  # when that began, and when something was last printed
_shown = False  # whether the terminal shows it now


class _Stream(io.FileIO):
    """A standard stream; with `goes_on` what cannot be written is dropped, and nothing ends."""

    goes_on = False

    def write(self, data: Any) -> int:
        erase()
        try:
            return super().write(data) or len(data)
        except OSError:
            if self.goes_on:
                return len(data)
            raise


def begin(goes_on: bool = False) -> None:
    """Readies stdout and stderr. goes_on: the work matters, and not whether anyone reads of it.

    Letters that a stream has not are escaped, and a line is written when it is printed. Of the
    environment, what would change the dtypes of a run is left out. A stream that is closed is one
    that nobody reads: else the next file that is opened would take its number, and be printed to.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue  # a caller's own
        raw = _Stream(number, "wb", closefd=False)
        raw.goes_on = goes_on
        encoding = before.encoding if before else "utf-8"
        how: dict[str, Any] = {"errors": "backslashreplace", "line_buffering": True}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, **how))
    os.environ.pop("JAX_ENABLE_X64", None)
    os.environ.pop("JAX_DEFAULT_DTYPE_BITS", None)
    terminal = next((number for number in (2, 1) if os.isatty(number)), None)
    if terminal or goes_on:
        threading.Thread(target=_watch, args=[terminal], name="waiting", daemon=True).start()


def discard() -> None:
    """From now on stdout is read by nobody, what has not been written included."""
    number = os.open(os.devnull, os.O_WRONLY)
    os.dup2(number, 1)
    os.close(number)


def nobody() -> TextIO:
    """A stream that nobody reads, until the process ends."""
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Within this block whoever is told nothing for SILENT seconds is told `what`, and so on."""
    before = "at work" if _doing == "loading" else _doing
    now(what)
    try:
        yield
    finally:
        now(before)


def come(done: float, total: float) -> None:
    """How far this has come, for a terminal to show as a bar, with the time that is left."""
    global _come
    _come = min(1.0, done / max(1, total))


def now(what: str) -> None:
    """What is done from now on, for `doing`; "": what tells of itself."""
    global _doing, _since, _come
    _doing, _since, _come = what, time.monotonic(), 0.0


def erase() -> None:
    """Takes away what a terminal shows of a wait; before anything is printed."""
    global _shown, _written
    _written = time.monotonic()
    if _shown:
        _shown = False
        with contextlib.suppress(OSError):
            os.write(2, ERASE.encode())


def _watch(terminal: int | None) -> None:
    global _shown
    told = 0.0  # when that began of which the log has a line
    while True:
        time.sleep(0.25)
        silent = time.monotonic() - max(_since, _written)
        if not _doing or (silent <= SILENT and not _shown):
            continue
        with contextlib.suppress(OSError):
            if terminal:
                _shown = True
                width = os.get_terminal_size(terminal).columns or 80
                os.write(terminal, ERASE.encode() + _said()[-width + 1 :].encode(errors="replace"))
            elif told != _since:
                told = _since
                os.write(1, f"{_doing} ...\n".encode())


def _said() -> str:
    took, bar, left = time.monotonic() - _since, "", ""
    if _come:
        bar = f" [{'#' * round(BAR * _come):-<{BAR}}] {_come:.0%}"
        left = f", {took * (1 / _come - 1):.0f} s left"
    return f"{_doing}{bar} ... {took:.0f} s{left}"
