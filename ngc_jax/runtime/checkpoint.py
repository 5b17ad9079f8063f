"""Checkpoints: saved in the background, sealed with checksums, and read only if the seal holds.

For: the only file that touches Orbax. Checkpoint s is the state after s updates. Not for: when to
save (`training/loop.py`).

Orbax commits a step by renaming its directory, so a kill while saving leaves no half step behind.
But it restores a step with a flipped byte in silence. So each committed step is sealed with the
SHA-256 of its files, and a step whose seal is missing or broken is skipped for the newest sound
one.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ngc_jax.runtime import multihost
from ngc_jax.runtime.files import Path, files, in_bucket, move, sync, write_durably

Tree = Any
MANIFEST = "MANIFEST.json"


class SaveFailed(OSError):
    """A checkpoint could not be written, on a full disk say; those before it are untouched."""


class Restored(NamedTuple):
    """A state, its step, and what was saved beside it."""

    step: int
    state: Tree
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints in one directory. `read_only` never writes or moves anything there."""

    def __init__(self, directory: Path, keep: int = 3, read_only: bool = False):
        path = directory if in_bucket(directory) else os.path.abspath(directory)
        self.directory = epath.Path(path)
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            cleanup_tmp_directories=False,  # Orbax would do it in the background; `save` does it
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=self._options)
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="seal")
        self._sealing: tuple[int, concurrent.futures.Future[None]] | None = None

    def steps(self) -> list[int]:
        """Committed steps, oldest first, sound or not."""
        return sorted(self._manager.all_steps()) if self.directory.is_dir() else []

    def fault(self, step: int) -> str | None:
        """What is wrong with a step, or None if its seal holds."""
        home = self.directory / str(step)
        try:
            manifest = json.loads((home / MANIFEST).read_text())
            found = _checksums(home)
        except FileNotFoundError:
            return "it is not sealed: it is being written, or the run ended meanwhile"
        except (OSError, ValueError) as error:
            return f"it cannot be read: {error}"
        if not isinstance(manifest, dict):
            return f"{MANIFEST} is no list of checksums"
        for name in sorted(manifest.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if found[name] != manifest.get(name):
                return f"{name} does not match its checksum"
        return None

    def newest_sound(
        self, among: Collection[int] | None = None
    ) -> tuple[int | None, dict[int, str]]:
        """The newest sound step, if any, of these or of all, and the faults of the steps after."""
        faults: dict[int, str] = {}
        for step in reversed(self.steps()):
            if among is None or step in among:
                fault = self.fault(step)
                if fault is None:
                    return step, faults
                faults[step] = fault
        return None, faults

    def set_aside(self, step: int) -> Path:
        """Moves an unsound step aside, so that it can be saved again. Returns its new place."""
        aside = self.directory.parent / "damaged" / str(step)
        move(self.directory / str(step), aside)
        self.reload()
        return aside

    def reload(self) -> None:
        """Sees what another process has moved."""
        self._manager.reload()

    def restore(self, step: int, abstract: Tree) -> Restored:
        """A step, read into the shapes, dtypes and shardings of `abstract`."""
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        read = self._manager.restore(step, args=items)
        return Restored(step, read["state"], read["meta"])

    def save(self, step: int, state: Tree, meta: dict[str, Any]) -> None:
        """Saves in the background, after the save before this one. Raises SaveFailed for both."""
        self.wait()
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        if multihost.first():
            self._remove_begun()
            if in_bucket(self.directory):  # where a step has its name from the start
                _remove(self.directory / str(step))
        with self._attempt(step):
            self._manager.save(step, args=items, force=True)
        self._sealing = step, self._pool.submit(self._seal, step)

    def check(self) -> None:
        """Raises SaveFailed at once for a save in the background that has failed, if one did."""
        if self._sealing is not None and self._sealing[1].done():
            self.wait()

    def wait(self) -> None:
        """Returns when all is saved and sealed. Raises SaveFailed, once for each failed save."""
        if self._sealing is not None:
            (step, sealing), self._sealing = self._sealing, None
            with self._attempt(step):
                sealing.result()

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints after a step; a run that continues from it makes them anew."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def close(self) -> None:
        """Waits, then lets go of the directory."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._manager.close()

    @contextlib.contextmanager
    def _attempt(self, step: int) -> Iterator[None]:
        """Raises SaveFailed for a save that fails, and makes ready for the next."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's for a file that cannot be written
            # Many processes cannot go on: the others may be waiting for this one in the save.
            if jax.process_count() == 1:
                with contextlib.suppress(OSError, ValueError):
                    self._manager.close()  # it would raise the same for every save to come
                home = self.directory / str(step)
                if not (home / MANIFEST).exists():
                    _remove(home)
                self._manager = ocp.CheckpointManager(self.directory, options=self._options)
            cause = str(error).partition(" [tensorstore_spec")[0]
            raise SaveFailed(f"checkpoint {step} could not be saved: {cause}") from error

    def _seal(self, step: int) -> None:
        self._manager.wait_until_finished()
        if multihost.first():
            home = self.directory / str(step)
            write_durably(home / MANIFEST, json.dumps(_checksums(home), indent=1))
            if not in_bucket(home):
                sync(self.directory)  # where Orbax has given the step its name
            # Again: Orbax's threads may write on for a while after a failed save was raised.
            self._remove_begun()

    def _remove_begun(self) -> None:
        """Removes what a kill or a failed save has left, while none is under way."""
        for begun in self.directory.glob("*.orbax-checkpoint-tmp*"):
            _remove(begun)


def digest(tree: Tree) -> str:
    """SHA-256, hex, over path, dtype, shape and bytes of every array of a tree."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _remove(home: Path) -> None:
    with contextlib.suppress(OSError):
        epath.Path(home).rmtree(missing_ok=True)


def _checksums(home: Path) -> dict[str, str]:
    return {
        str(path.relative_to(home)): _sha256(path)
        for path in files(home)
        if MANIFEST not in path.name
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
