"""Checkpoints: saved in the background, sealed, and read only where the seal and the state hold.

For: the only file that touches Orbax. Checkpoint s is the state after s updates. Not for: when to
save (`training/loop.py`).

Orbax commits a step by renaming its directory, but restores one with a flipped byte, or under any
name. So MANIFEST.json seals each: its step, what the run says of itself (`meta`), the parameter
tree, and the SHA-256 of every other file. (Before version 0.2 it is a plain {file: SHA-256}.)
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ngc_jax.runtime import files, multihost
from ngc_jax.runtime.errors import UserError, plain

Tree = Any
MANIFEST = "MANIFEST.json"
SPEC = " [tensorstore_spec"  # begins what TensorStore adds to an error
UNSAID = 2**40 - 1  # as the step of a manifest: an old one, which names none
LARGEST = 1 << 26  # bytes of a manifest, and of what a checkpoint holds besides its arrays
# Bytes of a file of arrays, and of a chunk of one: while it is written, what is compressed waits in
# memory. (Orbax takes 2 GB.)
FILE_BYTES = 1 << 24
# What a run says of itself, where it says nothing: seconds of training, fingerprint of its data,
# software, config {field: value}, how many rows of metrics.jsonl there were, and their SHA-256; and
# what parameters that were not trained here come from.
META: dict[str, Any] = {"seconds": 0.0, "data": "", "versions": {}, "rewinds": 0, "passed": 0}
META |= {"origin": ""}
META |= {"config": {}, "rows": 0, "rows_sha256": ""}


class SaveFailed(OSError):
    """A checkpoint could not be written, on a full disk say; those before it are untouched."""


class Damaged(UserError):
    """A checkpoint cannot be read, or is not what its name says."""


class Foreign(Damaged):
    """A checkpoint is whole, but of another config or with another parameter tree."""


class Restored(NamedTuple):
    """A state, its step, and what was saved beside it."""

    step: int
    state: Tree
    meta: dict[str, Any]


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints in a directory, which must be no link; `read_only` changes nothing there.

    Of the state's field `without` no array is read: `...` stands in its place.
    """

    def __init__(
        self, directory: files.Path, keep: int = 3, read_only: bool = False, without: str = ""
    ):
        path = directory if files.in_bucket(directory) else os.path.abspath(directory)
        if os.path.islink(path):
            raise UserError(f"{directory} is a link, which is not followed: give the place itself")
        self.directory, self._keep, self._without = epath.Path(path), keep, without
        self._opened = -1
        if multihost.first() and not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        # Where directories are made meanwhile, threads wait five minutes for one that is not made.
        how = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        inner = ocp.CompositeOptions(async_options=how)
        handler = ocp.CompositeCheckpointHandler("state", composite_options=inner)
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=how)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: concurrent.futures.Future[None] | None = None

    def steps(self) -> list[int]:
        """Committed steps, oldest first, sound or not."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        # Not "007", which is no name of ours.
        return sorted(int(p.name) for p in found if re.fullmatch("0|[1-9][0-9]*", p.name))

    def fault(self, step: int, most: float = float("inf")) -> str | None:
        """What is wrong with a step, or None if its seal holds. `most`: bytes that it may have."""
        home = self.directory / str(step)
        try:
            if os.path.islink(home):
                return "it is a link, which is not followed"
            held = files.inside(home)
            if MANIFEST not in held:
                return "it is not sealed: it is being written, or the run ended meanwhile"
            size = sum(epath.Path(path).stat().length for path in held.values())
            if size > most:
                return f"it has {size} bytes, of a state that needs fewer than {most}"
            manifest = _manifest(home)
            if manifest["step"] not in (UNSAID, step):
                return f"it is checkpoint {manifest['step']} under another name"
            sealed = manifest["files"]
            for name in sorted(sealed.keys() | held.keys() - {MANIFEST}):
                if name not in held:
                    return f"{name} is missing"
                if files.sha256(held[name]) != sealed.get(name):
                    return f"{name} does not match its checksum"
        except (OSError, ValueError, RecursionError) as error:
            return f"it cannot be read: {error}"
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was told of a step. Raises OSError and ValueError where it cannot be read."""
        return dict(_manifest(self.directory / str(step))["meta"])

    def newest_sound(self) -> int | None:
        """The newest step whose seal holds, if any."""
        return next((step for step in reversed(self.steps()) if not self.fault(step)), None)

    def newest(
        self, like: Tree, config: dict[str, Any] | None = None, among: Collection[int] | None = None
    ) -> tuple[Restored | None, dict[int, str]]:
        """The newest step, of these or of all, that `restore` reads; faults of those after it.

        Raises Foreign where it reads none, and one is whole.
        """
        faults: dict[int, str] = {}
        foreign = ""
        for step in reversed(multihost.exchange(self.steps())[0]):
            if among is None or step in among:
                try:
                    return self.restore(step, like, config), faults
                except Damaged as error:
                    faults[step] = plain(error)
                    if isinstance(error, Foreign):
                        foreign = f"checkpoint {step}: {faults[step]}"
        if foreign:
            raise Foreign(foreign)
        return None, faults

    def set_aside(self, step: int) -> epath.Path:
        """Moves an unsound step aside, so that it can be saved again. Returns its new place."""
        aside = self.directory.parent / "damaged" / str(step)
        files.move(self.directory / str(step), aside)
        return aside

    def restore(self, step: int, like: Tree, config: dict[str, Any] | None = None) -> Restored:
        """A step, in shapes, dtypes and shardings of `like`. Fields of `config` must be as there.

        Raises Damaged in every process where one of them cannot read it, and Foreign.
        """
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
        fault = self.fault(step, 2 * needed + LARGEST) if multihost.first() else None
        (fault, *_) = multihost.exchange(fault)
        if fault is None:
            try:
                found = self._read(step, like, config or {})
            except Foreign:
                raise
            except Exception as error:  # whatever Orbax and TensorStore raise for what they read
                fault = f"it cannot be restored: {str(error).partition(SPEC)[0]}"
            (fault, *_) = [*filter(None, multihost.exchange(fault)), None]
        if fault is not None:
            raise Damaged(fault)
        return found

    def _read(self, step: int, like: Tree, config: dict[str, Any]) -> Restored:
        home = self.directory / str(step)
        manifest = _manifest(home)
        meta, tree = manifest["meta"], manifest["tree"]
        for name in sorted(config.keys() & meta["config"].keys()):
            was, wanted = meta["config"][name], config[name]
            if was != wanted:
                raise Foreign(f"it is of another run: {name} was {was!r}, is {wanted!r}")
        shapes = _shapes(like) if tree else {}  # an old manifest names none
        other = f"it is of another model, or made by other software ({meta['versions']})"
        for name in sorted(tree.keys() | shapes.keys()):
            was, wanted = tree.get(name), shapes.get(name)
            if was != wanted:
                raise Foreign(f"{name} is of shape {was}, not {wanted}: {other}")
        # By itself, without a barrier: one that fails here would leave the others waiting at it.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(me, {me}, f"process{me}")
        handler = ocp.CompositeCheckpointHandler("state")
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as orbax:
            if self._without:
                skipped = jax.tree.map(lambda _: ocp.PLACEHOLDER, getattr(like, self._without))
                like = dataclasses.replace(like, **{self._without: skipped})
            how = ocp.checkpoint_utils.construct_restore_args(like)
            items = ocp.args.Composite(state=ocp.args.PyTreeRestore(like, restore_args=how))
            state = orbax.restore(self._plainly() / str(step), args=items)["state"]
        updates = int(_named(state).get("step", step))
        if updates != step:
            raise ValueError(f"its state is that after {updates} updates")
        return Restored(step, state, meta)

    def save(
        self, step: int, state: Tree, meta: dict[str, Any], spared: Sequence[Iterable[int]] = ()
    ) -> None:
        """Saves in the background, after the save before this one. Raises SaveFailed for both.

        Of each list in `spared`, the first step that there is stays beside the newest ones.
        """
        self.wait()
        arrays = ocp.args.PyTreeSave(state, ocdbt_target_data_file_size=FILE_BYTES)
        items = ocp.args.Composite(state=arrays)
        if multihost.first():
            self._drop()
            if files.in_bucket(self.directory):  # where a step has its name from the start
                files.remove(self.directory / str(step))
        with self._attempt(step):
            self._orbax.save(self._plainly() / str(step), args=items, force=True)
        self._sealing = self._pool.submit(self._seal, step, meta, _shapes(state), spared)

    def check(self) -> None:
        """Raises SaveFailed at once for a save in the background that has failed, if one did."""
        if self._sealing and self._sealing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when all is saved and sealed. Raises SaveFailed, once for each failed save."""
        sealing, self._sealing = self._sealing, None
        if sealing:
            sealing.result()

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints after a step; a run that continues from it makes them anew."""
        if multihost.first():
            self._drop([later for later in self.steps() if later > step])

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._orbax.close()
            if self._opened >= 0:
                os.close(self._opened)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is KeyboardInterrupt:  # wants to leave at once
            self._pool.shutdown(wait=False)
            return
        # An error that is under way says more than that of a save.
        with contextlib.suppress(*[SaveFailed] * (kind is not None)):
            self.close()

    @contextlib.contextmanager
    def _attempt(self, step: int) -> Iterator[None]:
        """Raises SaveFailed for a save that fails, and makes ready for the next."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's for a file that cannot be written
            # Many processes cannot go on: the others may be waiting for this one in the save.
            home = self.directory / str(step)
            if jax.process_count() == 1 and not (home / MANIFEST).exists():
                files.remove(home)
            cause = str(error).partition(SPEC)[0]
            raise SaveFailed(f"checkpoint {step} could not be saved: {cause}") from error

    def _seal(
        self, step: int, meta: dict[str, Any], tree: dict[str, str], spared: Sequence[Iterable[int]]
    ) -> None:
        with self._attempt(step):
            self._orbax.wait_until_finished()
            if not multihost.first():
                return
            home = self.directory / str(step)
            # A sum proves bytes, and not that they are a state: each array is opened, not read.
            ocp.StandardCheckpointHandler().metadata(self._plainly() / str(step) / "state")
            sums = {name: files.sha256(path) for name, path in files.inside(home).items()}
            sums.pop(MANIFEST, None)
            seal = {"step": step, "meta": meta, "tree": tree, "files": sums}
            seal["sha256"] = _sum(seal)
            files.write_durably(home / MANIFEST, json.dumps(seal, indent=1))
            if not files.in_bucket(home):
                files.sync(self.directory)  # where Orbax has given the step its name
            try:
                _manifest(home)
            except (OSError, ValueError):  # it neither replaces older ones, nor counts as one
                files.remove(home / MANIFEST)
                raise
            # Begun ones again: Orbax's threads may write on after a failed save was raised.
            there = self.steps()
            kept = {next((step for step in one if step in there), None) for one in spared}
            self._drop(set(there[: -self._keep]) - kept)
        _give_back()

    def _drop(self, steps: Iterable[int | None] = ()) -> None:
        """Removes steps, and what a kill or a failed save has begun, while none is under way."""
        for step in steps:
            home = self.directory / str(step)
            if files.in_bucket(home):
                files.remove(home)
            else:  # a kill must not leave a half one
                home.replace(home.with_name(f"{step}.orbax-checkpoint-tmp-dropped"))
        for begun in self.directory.iterdir() if self.directory.is_dir() else ():
            if ".orbax-checkpoint-tmp" in begun.name:
                files.remove(begun)

    def _plainly(self) -> epath.Path:
        """The directory by a name that is no pattern, "run[1]", has no backslash, and is UTF-8."""
        name = str(self.directory)
        if files.in_bucket(self.directory) or not re.search(r"[*?[\\\ud800-\udfff]", name):
            return self.directory
        if self._opened < 0:
            self._opened = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        return epath.Path(f"/proc/self/fd/{self._opened}")


def _give_back() -> None:
    """Returns memory that a save has used to the system: else parts of it stay, save after save."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def quiet_failures() -> None:
    """Makes a program leave out what libraries tell of the parts of a failed save: we say it."""

    def unraisable(told: Any) -> None:
        if str(told.exc_value) not in ("Event loop is closed", "coroutine ignored GeneratorExit"):
            sys.__unraisablehook__(told)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def digest(tree: Tree) -> str:
    """SHA-256, hex, over path, dtype, shape and bytes of every array of a tree."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _named(tree: Tree) -> dict[str, Any]:
    leaves, keystr = jax.tree_util.tree_leaves_with_path(tree), jax.tree_util.keystr
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _shapes(tree: Tree) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _sum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _manifest(home: epath.Path) -> dict[str, Any]:
    """A checkpoint's step (UNSAID in an old one), files, meta and tree ({} in an old one)."""
    found = files.read_json(home / MANIFEST, LARGEST)
    if isinstance(found, dict) and isinstance(found.get("meta/metadata"), str):
        said = files.read_json(home / "meta" / "metadata", LARGEST)
        found = {"step": UNSAID, "files": found, "meta": said, "tree": {}}
    like: dict[str, Any] = {"step": 0, "files": {}, "meta": {}, "tree": {}}
    said = found.pop("sha256", None) if isinstance(found, dict) else None
    if not isinstance(found, dict) or found.keys() != like.keys():
        raise ValueError(f"{MANIFEST} is no manifest")
    if said not in (None, _sum(found)):  # none in one of an early 0.2
        raise ValueError(f"{MANIFEST} does not match its checksum")
    if isinstance(found["meta"], dict):
        found["meta"] = META | found["meta"]
    for part, examples in ((found, like), (found["meta"], META)):
        for name, example in examples.items():
            value, number = part[name], isinstance(example, int | float)
            if not isinstance(value, int | float if number else type(example)):
                raise ValueError(f"{MANIFEST}: {name} is {value!r:.40}")
            if number and not 0 <= value < 2**40:
                raise ValueError(f"{MANIFEST}: {name}={value} is out of range")
    return found
