"""What a command prints: to pipes that break, to closed streams, in letters that a terminal lacks.

For: `begin`, first in every command; `doing`, which says what a wait is for: on a terminal how long
and how far, in the log of a run once; `tolerated`, for programs that import this package. Not for:
what is printed.
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
# Settings of jax that change a program's dtypes, or refuse it; those of a user's environment.
STEADY = {"jax_enable_x64": False, "jax_numpy_dtype_promotion": "standard"}
STEADY |= {"jax_numpy_rank_promotion": "allow", "jax_disable_jit": False}
GUARDS = ("", "_host_to_device", "_device_to_device", "_device_to_host")
STEADY |= {f"jax_transfer_guard{which}": "allow" for which in GUARDS}
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


def occupy() -> None:
    """Makes a standard stream that is closed one that nobody reads.

    Else the next file that is opened would take its number, and be printed to.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)


def begin(goes_on: bool = False) -> None:
    """Readies stdout and stderr. goes_on: the work matters, and not whether anyone reads of it.

    Letters that a stream has not are escaped, and a line is written when it is printed. Of the
    environment, what would change the dtypes of a run is left out.
    """
    occupy()
    for name, number in (("stdout", 1), ("stderr", 2)):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__"):
            continue  # a caller's own
        raw = _Stream(number, "wb", closefd=False)
        raw.goes_on = goes_on or number == 2  # what a command is for is on stdout
        encoding = before.encoding if before else "utf-8"
        how: dict[str, Any] = {"errors": "backslashreplace", "line_buffering": True}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, **how))
    os.environ.pop("JAX_DEFAULT_DTYPE_BITS", None)
    for setting, value in STEADY.items():
        os.environ.pop(setting.upper(), None)
        if "jax" in sys.modules:  # which has read it
            sys.modules["jax"].config.update(setting, value)
    terminal = next((number for number in (2, 1) if os.isatty(number)), None)
    if terminal or goes_on:
        threading.Thread(target=_watch, args=[terminal], name="waiting", daemon=True).start()


class _Tolerant:
    """A program's own stream, as `begin` makes those of a command that goes on."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        letters = getattr(self._stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
            self._stream.write(text.encode(letters, "backslashreplace").decode(letters))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def tolerated() -> contextlib.AbstractContextManager[Any]:
    """A block in which what a program that imports this package cannot print ends nothing."""
    own: Any = sys.stdout and _Tolerant(sys.stdout)
    return contextlib.redirect_stdout(own)


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
