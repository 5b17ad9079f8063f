"""What a run reports: rows in metrics.jsonl, a view of them for TensorBoard, and the live line.

For: writing and reading rows. Not for: computing them. A row is {"step": s, name: value, ...}; its
values belong to update s. A run that continues from checkpoint s keeps the rows up to s and writes
the later ones anew.
"""

import contextlib
import json
import math
import shutil
import sys
import time
import types
from collections.abc import Iterable
from typing import Any

from ngc_jax.runtime import multihost
from ngc_jax.runtime.files import Log, Path, in_bucket

Row = dict[str, Any]
TIMES = ("seconds", "tokens_per_second", "mfu")  # the only values that repeating a run changes


def read_rows(workdir: Path) -> list[Row]:
    """All whole rows; a last line that a kill cut off is left out."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def latest(rows: Iterable[Row]) -> Row:
    """The newest value of each measure."""
    return {name: value for row in rows for name, value in row.items()}


class Metrics:
    """Appends rows. Opening it drops the rows after `start`, the step that the run continues from.

    `measured`: what the rows of `start` hold besides its update: "eval", "stability", "final",
    "wiring". Of many processes the first one writes, and all must open it.
    """

    def __init__(self, workdir: Path, start: int):
        writes = multihost.first()
        rows = read_rows(workdir) if start and writes else []
        kept = [row for row in rows if row["step"] <= start]
        others = [row for row in kept if row["step"] == start and "train/loss" not in row]
        measured = {name.partition("/")[0] for row in others for name in row}
        self.measured = set(multihost.exchange(sorted(measured))[0])
        self._log = self._board = None
        if not writes:
            return
        self._log = Log(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self._board = _Board.open(workdir / "tensorboard")
        if self._board:
            for row in kept:
                self._board.write(row)

    def write(self, row: Row) -> None:
        """Adds a row, null for numbers that are not finite. A full disk raises no error yet."""
        if not self._log:
            return
        finite = lambda v: not isinstance(v, float) or math.isfinite(v)  # noqa: E731
        row = {name: value if finite(value) else None for name, value in row.items()}
        self._log.add(json.dumps(row) + "\n")
        if self._board:
            try:
                self._board.write(row)
            except OSError:
                self._board = None  # it is only a view, made anew when the run continues

    def sync(self) -> None:
        """Puts all rows on disk, before a checkpoint, which so never lacks the rows before it.

        Raises OSError where that cannot be; the rows are kept for the next time.
        """
        if self._log:
            self._log.sync()

    def close(self) -> None:
        if self._log:
            self._log.close()
        if self._board:
            with contextlib.suppress(OSError):
                self._board.close()


class _Board:
    """TensorBoard event files, a view of the rows: rewritten each time a run continues."""

    def __init__(self, directory: Path):
        # With this name importable TensorBoard does not load TensorFlow, where that is installed.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        shutil.rmtree(directory, ignore_errors=True)
        self._writer = EventFileWriter(str(directory))

    @classmethod
    def open(cls, directory: Path) -> "_Board | None":
        try:
            return None if in_bucket(directory) else cls(directory)
        except ImportError:
            return None  # the extra is not installed; metrics.jsonl holds everything

    def write(self, row: Row) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = {k: v for k, v in row.items() if k != "step" and v is not None}
        summary = Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in shown.items()])
        self._writer.add_event(Event(wall_time=time.time(), step=row["step"], summary=summary))

    def close(self) -> None:
        self._writer.close()


class Clock:
    """Seconds of training, `before` of them in earlier starts; `with clock:` is not counted."""

    def __init__(self, before: float):
        self._before, self._since = before, time.monotonic()
        self._mark = (0, self.seconds())

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._since

    def start(self, step: int) -> None:
        """Begins the first lap."""
        self._mark = (step, self.seconds())

    def lap(self, step: int) -> float:
        """Seconds per step since the last lap."""
        last, then = self._mark
        now = self.seconds()
        self._mark = (step, now)
        return (now - then) / max(1, step - last)

    def __enter__(self) -> "Clock":
        self._paused = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._since += time.monotonic() - self._paused


class Progress:
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int):
        self.steps, self.live = steps, sys.stdout.isatty()

    def show(self, step: int, loss: float, speed: Row, seconds_per_step: float) -> None:
        """Shows an update; `speed` has "tokens_per_second", and "mfu" where a peak is known."""
        left = duration(seconds_per_step * (self.steps - step))
        mfu = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        pace = f"{speed['tokens_per_second']:,.0f} tokens/s{mfu}"
        line = f"step {step}/{self.steps}  loss {loss:.4f}  {pace}  ETA {left}"
        print(f"\r\x1b[K{line}" if self.live else line, end="" if self.live else "\n", flush=True)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        print(f"\r\x1b[K{text}" if self.live else text, flush=True)


def duration(seconds: float) -> str:
    """125.0 -> "2:05"; 3725.0 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
