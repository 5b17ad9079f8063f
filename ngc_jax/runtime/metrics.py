"""What a run reports: rows in metrics.jsonl, which trackers show too, and the live line.

For: rows {"step": s, name: value, ...}, whose values belong to update s. Not for: computing them,
or what shows them (`trackers.py`).
"""

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import time
from collections.abc import Iterable
from typing import Any

from ngc_jax.runtime import files, multihost, output
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.trackers import Trackers

Row = dict[str, Any]
LARGEST = 1 << 32  # bytes of metrics.jsonl that are read
BITE = 1 << 23  # of which as many at once, where it is followed
SPEEDS = {"tokens_per_second": "tokens/s", "images_per_second": "images/s"}
TIMES = ("seconds", *SPEEDS, "mfu")  # the only values that repeating a run changes


def read_rows(workdir: files.Path) -> list[Row]:
    """All rows that can be read: not one that a kill cut off, nor what is no row."""
    return [row for row in _lines(workdir).values() if row]


def _lines(workdir: files.Path) -> dict[int, Row | None]:
    """Whole lines as rows, by number; None: no row. Blank ones, also of NULs, are left out."""
    path = workdir / "metrics.jsonl"
    try:
        lines = files.read(path, LARGEST).split(b"\n")[:-1]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _whole(lines)


def _whole(lines: list[bytes], texts: bool = False) -> dict[int, Row | None]:
    stripped = enumerate((line.strip(b"\0 \t\r") for line in lines), 1)
    return {at: _row(line, texts) for at, line in stripped if line}


def _row(line: bytes, texts: bool = False) -> Row | None:
    try:
        row = json.loads(line.decode())
        step, most = row["step"], sys.float_info.max
        values = (value for value in row.values() if not texts or not isinstance(value, str))
        numbers = (abs(value) <= most for value in values if value is not None)
        return row if type(step) is int and 0 <= step < 2**53 and all(numbers) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


class Growing:
    """The rows of a metrics.jsonl that grows, each read once; `step` and strings of events.jsonl.

    A file that is another one than before, since a run went on from a checkpoint, is read anew.
    """

    def __init__(self, path: files.Path, texts: bool = False):
        self._path, self._texts = path, texts
        self._at, self._tail, self.changed = 0, b"", 0.0

    def new(self) -> tuple[bool, list[Row]]:
        """Whether all rows so far are void, and whole lines since, of BITE bytes at most."""
        try:
            with open(self._path, "rb", opener=files.no_follow) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    raise OSError(f"{self._path} is no file")
                file.seek(self._at - len(self._tail))
                anew = file.read(len(self._tail)) != self._tail
                if anew:
                    self._at = file.seek(0)
                raw, self.changed = file.read(BITE), found.st_mtime
        except OSError:
            anew, raw, self._at = self._at > 0, b"", 0
        end = raw.rfind(b"\n") + 1 or len(raw) * (len(raw) == BITE)  # a line that long is no row
        self._tail = (raw[:end] if anew else self._tail + raw[:end])[-256:]
        self._at += end
        return anew, [row for row in _whole(raw[:end].split(b"\n"), self._texts).values() if row]


def note(workdir: files.Path, step: int, text: str, **more: Any) -> None:
    """Adds to DIR/events.jsonl, which no run reads, what rows do not say. Not in a bucket."""
    if multihost.first() and not files.in_bucket(workdir):
        line = json.dumps({"step": step, "time": time.time(), "text": text, **more}) + "\n"
        with (
            contextlib.suppress(OSError),
            open(workdir / "events.jsonl", "ab", 0, opener=files.no_follow) as file,
        ):
            file.write(line.encode())


def latest(rows: Iterable[Row]) -> Row:
    """The newest value of each measure."""
    return {name: value for row in rows for name, value in row.items()}


def best_first(rows: Iterable[Row]) -> list[int]:
    """Steps that have a held-out loss, the least loss first; of equal ones the earliest."""
    found = {row["step"]: row["eval/loss"] for row in rows if row.get("eval/loss") is not None}
    return sorted(found, key=lambda step: (found[step], step))


class Metrics:
    """Appends rows. Opening it drops the rows after `start`, the step that the run continues from.

    `measured`: what the rows of `start` hold besides its update: "eval", "stability", "final",
    "wiring". `evaluated`: rows with a held-out loss. Every process opens it; the first one writes.
    `rows`, `sha256`: how many rows a checkpoint of `start` counted (0: not known), and their
    digest. `trackers`: names of those that show all rows, with commas between. Raises UserError for
    lost rows.
    """

    def __init__(
        self, workdir: files.Path, start: int, rows: int = 0, sha256: str = "", trackers: str = ""
    ):
        writes = multihost.first()
        with multihost.agreed():
            kept = _kept(workdir, start, rows, sha256) if start and writes else []
        others = [row for row in kept if row["step"] == start and "train/loss" not in row]
        measured = {name.partition("/")[0] for row in others for name in row}
        self.measured = set(multihost.exchange(sorted(measured))[0])
        self.evaluated = multihost.exchange([row for row in kept if "eval/loss" in row])[0]
        self._rows, self._sha256 = len(kept), hashlib.sha256(_text(*kept).encode())
        self._log = files.Log(workdir / "metrics.jsonl", _text(*kept)) if writes else None
        self._trackers = Trackers(trackers if writes else "", workdir)
        self._trackers.log(*kept)

    def write(self, row: Row) -> None:
        """Adds a row, null for numbers that are not finite. A full disk raises no error yet."""
        wrong = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
        row = {**row, **dict.fromkeys(wrong)}
        self.evaluated += [row] * ("eval/loss" in row)
        if self._log:
            self._log.add(_text(row))
            self._rows += 1
            self._sha256.update(_text(row).encode())
            self._trackers.log(row)

    def written(self) -> dict[str, Any]:
        """How many rows there are, and their digest, for a checkpoint to keep."""
        return {"rows": self._rows, "rows_sha256": self._sha256.hexdigest()}

    def sync(self) -> None:
        """Puts all rows on disk, before a checkpoint. Raises OSError; the rows are kept then."""
        if self._log:
            self._log.sync()

    def close(self) -> None:
        if self._log:
            self._log.close()
        self._trackers.close()


def _text(*rows: Row) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _kept(workdir: files.Path, start: int, rows: int, sha256: str) -> list[Row]:
    """The rows up to `start`. Says what it drops; see Metrics."""
    path, lines = workdir / "metrics.jsonl", _lines(workdir)
    up_to = {at: row for at, row in lines.items() if row and row["step"] <= start}
    kept, bad = [*up_to.values()], [at for at, row in lines.items() if row is None]
    lost = f"line {bad[0]} is no row" if bad and bad[0] < max(up_to, default=0) else ""
    if rows and hashlib.sha256(_text(*kept[:rows]).encode()).hexdigest() == sha256:
        lost = ""  # whatever is no row there, none is missing
    elif rows and path.exists():
        lost = f"of the {rows} rows up to checkpoint {start}, {min(len(kept), rows)} are there"
        lost += f", line {bad[0]} is no row" if bad else ", not all as they were"
    elif rows:
        print(f"{path} is gone: the {rows} rows up to step {start} are missing", flush=True)
    if lost:
        mend = "put the file back as it was, or move it away to go on without the rows so far"
        raise UserError(f"{path}: {lost}, and they cannot be made again: {mend}")
    if bad:
        print(f"{path}: dropped {len(bad)} lines that are no rows, from {bad[0]} on", flush=True)
    return kept


class Clock:
    """Seconds of training, `before` of them in earlier starts; `with clock:` is not counted."""

    def __init__(self, before: float):
        self._before, self._since = before, time.monotonic()
        self._mark = (0, self.seconds())

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._since

    def lap(self, step: int) -> float:
        """Seconds per step since the last lap; begins the next one."""
        (last, then), self._mark = self._mark, (step, self.seconds())
        return (self._mark[1] - then) / max(1, step - last)

    def __enter__(self) -> "Clock":
        self._paused = time.monotonic()
        return self

    def __exit__(self, *error: Any) -> None:
        self._since += time.monotonic() - self._paused


class Progress:
    """A live line on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int):
        self.steps, self.live = steps, bool(sys.stdout and sys.stdout.isatty())

    def show(self, step: int, loss: float, speed: Row, seconds_per_step: float) -> None:
        """Shows an update; `speed` has one of SPEEDS, and "mfu" where a peak is known."""
        left = duration(seconds_per_step * (self.steps - step))
        mfu = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        pace = next(f"{speed[name]:,.0f} {unit}" for name, unit in SPEEDS.items() if name in speed)
        line = f"step {step}/{self.steps}  loss {loss:.4f}  {pace}{mfu}  ETA {left}"
        if self.live:
            output.now(line)
        self.say(line, "" if self.live else "\n")

    def say(self, text: str, end: str = "\n") -> None:
        """Prints a line that stays."""
        try:
            print(f"\r\x1b[K{text}" if self.live else text, end=end, flush=True)
        except OSError:  # the terminal is gone; the run goes on, or is saved
            sys.stdout = output.nobody()


class Advance:
    """How far work of a known amount has come, and when it will end: one line every two seconds.

    Elsewhere than on a terminal a line every half minute. total: in `unit`; 0: not known.
    """

    def __init__(self, what: str, total: int, unit: str = "B"):
        self.what, self.total, self.unit, self.done, self.skipped = what, total, unit, 0, 0
        self.progress, self.since = Progress(0), time.monotonic()
        self.told = self.since

    def add(self, count: int, skipped: bool = False) -> None:
        """Counts what was done; `skipped`: in an earlier start, so it says nothing of the speed."""
        self.done, self.skipped = self.done + count, self.skipped + count * skipped
        now, live = time.monotonic(), self.progress.live
        if now - self.told < (2 if live else 30):
            return
        self.told, pace = now, max(1e-9, (self.done - self.skipped) / (now - self.since))
        left = max(0, self.total - self.done) / pace
        until = f"  ETA {duration(left)}" if left else ""
        whole = f" of {amount(self.total, self.unit)}" if self.total else ""
        come = f"{amount(self.done, self.unit)}{whole}  {amount(pace, self.unit)}/s{until}"
        self.progress.say(f"{self.what}: {come}", "" if live else "\n")


def amount(count: float, unit: str = "") -> str:
    """25 -> "25 B"; 8100 -> "8.1 kB"; 9370000 -> "9.37 MB"; 1.5e15 -> "1.50 PB"."""
    scales = [(1, 0, ""), (1e3, 1, "k"), (1e6, 2, "M"), (1e9, 2, "G"), (1e12, 2, "T")]
    fits = (of for of in scales if count < 999.5 * of[0])
    scale, digits, prefix = next(fits, (1e15, 2, "P"))
    return f"{count / scale:.{digits}f} {prefix}{unit}".rstrip()


def duration(seconds: float) -> str:
    """125.0 -> "2:05"; 3725.0 -> "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
