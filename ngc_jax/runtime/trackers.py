"""Who shows a run's rows beside metrics.jsonl: TensorBoard, trackio, Weights & Biases, your own.

For: `TRACKERS`, from which `train.trackers` chooses: name -> function of a work directory; a config
or a file of `--extend` may add to it. Not for: rows (`metrics.py`), from which a run goes on.
"""

import contextlib
import os
import re
import secrets
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError


class Tracker(Protocol):
    """A view of rows. One that is opened shows none: it gets the rows so far, then each new one."""

    def log(self, row: dict[str, Any]) -> None:
        """Shows {"step": s, name: number or None, ...}; several rows may have the same step."""

    def close(self) -> None:
        """Ends the view: no row comes any more."""


class Trackers:
    """Those of `names`, with commas between. What one raises is said once, and it is left out."""

    def __init__(self, names: str, home: files.Path):
        self._open: dict[str, Tracker] = {}
        for name in listed(names):
            with self._guarded(name):
                self._open[name] = TRACKERS[name](home)

    def log(self, *rows: dict[str, Any]) -> None:
        for name, tracker in [*self._open.items()]:
            with self._guarded(name):
                for row in rows:
                    tracker.log(row)

    def close(self) -> None:
        for name in [*self._open]:
            with self._guarded(name):
                self._open.pop(name).close()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever another library raises
            self._open.pop(name, None)
            why = " ".join(str(error).split())[:200] or type(error).__name__
            if isinstance(error, ImportError):
                why = f"{why}: pip install 'ngc_jax[{name}]'"
            told = f"train.trackers: {name} is left out ({why}); metrics.jsonl has all rows"
            with contextlib.suppress(OSError):
                print(told, flush=True)


def listed(names: str) -> list[str]:
    """The trackers of a list with commas. Raises UserError for one that TRACKERS does not have."""
    found = [name for name in names.split(",") if name]
    if strange := [name for name in found if name not in TRACKERS]:
        wants = f"some of {','.join(TRACKERS)}, or '' for none"
        raise UserError(f"train.trackers={names!r}: {strange[0]!r} is none: must be {wants}")
    return found


class TensorBoard:
    """An event file in DIR/tensorboard, made anew."""

    def __init__(self, home: files.Path):
        _local(home)
        # With this name importable TensorBoard does not load TensorFlow, where that is installed.
        sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        files.remove(home / "tensorboard")
        os.mkdir(home / "tensorboard")
        # Not TensorBoard's own writer, whose thread prints a traceback on a full disk.
        path = home / "tensorboard" / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"
        self._event, self._file = Event, RecordWriter(open(path, "xb", buffering=0))  # noqa: SIM115
        self._write(file_version="brain.Event:2")

    def log(self, row: dict[str, Any]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in _shown(row).items()]
        self._write(step=row["step"], summary={"value": values})

    def _write(self, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), **content).SerializeToString())

    def close(self) -> None:
        self._file.close()


class Trackio:
    """A run of project ngc_jax, or $TRACKIO_PROJECT, in trackio's own local folder, made anew."""

    def __init__(self, home: files.Path):
        import trackio

        project, name = os.environ.get("TRACKIO_PROJECT", "ngc_jax"), f"{home.name}-{_id(home)}"
        with contextlib.suppress(ValueError):  # no such project yet
            for run in [run for run in trackio.Api().runs(project) if run.name == name]:
                run.delete()
        how: dict[str, Any] = {"embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        self._run = trackio.init(project, name, config=_config(home), **how)

    def log(self, row: dict[str, Any]) -> None:
        self._run.log(_shown(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """A run of project ngc_jax, or $WANDB_PROJECT, in DIR/wandb; $WANDB_MODE=online sends it.

    Offline it is made anew. Online it goes on, and gets the steps that it has not.
    """

    def __init__(self, home: files.Path):
        _local(home)
        import wandb

        own, mode = _id(home), os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            for path in (home / "wandb").glob(f"offline-run-*-{own}"):
                files.remove(path)
        how: dict[str, Any] = {"id": own, "name": home.name, "resume": "allow", "dir": str(home)}
        how |= {"project": os.environ.get("WANDB_PROJECT", "ngc_jax"), "mode": mode}
        # stdout stays ours
        self._run = wandb.init(config=_config(home), settings=wandb.Settings(console="off"), **how)
        self._first = self._run.step

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] >= self._first:
            self._run.log(_shown(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[files.Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "step" and value is not None}


def _local(home: files.Path) -> None:
    if files.in_bucket(home):
        raise OSError(f"{home} is in a bucket, and its files must be local")


def _config(home: files.Path) -> Any:
    return files.read_json(home / "config.json", 1 << 20)


def _id(home: files.Path) -> str:
    """What tells a run from others of its name, as its directory keeps it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch("[0-9a-f]{8}", found := files.read(home / "tracker_id", 100).decode()):
            return found
    files.write_durably(home / "tracker_id", made := secrets.token_hex(4))
    return made
