"""The cache: folders of what was prepared, sealed when made, used while the seal holds.

For: making an entry once; a seal finds damage (docs/trust.md). Not for: what an entry holds.
"""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError

Build = Callable[[Path], None]
SEAL = "SEAL.json"  # {file: [SHA-256, its state when that was last found to hold]}


def cache_directory(config: Any) -> Path:
    """`data.cache_dir`, or the user's cache."""
    return files.expand(config.cache_dir or "~/.cache/ngc_jax")


def entry(cache: Path, name: str, build: Build, assist: Build = lambda building: None) -> Path:
    """The folder CACHE/NAME, sound, or made by `build(folder)`. Raises UserError if neither.

    One process builds, in an empty folder; others that share the disk wait, after assist(folder).
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{name!r} names an entry of data.cache_dir: must be letters and digits")
    try:
        files.make_private(cache)
    except OSError as error:
        raise UserError(f"data.cache_dir={str(cache)!r} cannot be used: {error}") from error
    home = cache / name
    if _fault(home):
        with _alone(home.with_name(f".{name}.part"), home, assist) as part:
            if fault := _fault(home):
                if os.path.lexists(home):
                    print(f"{home} is made again: {fault}")
                    files.remove(home)
                for path in part.iterdir() if part else ():
                    files.remove(path)
                with files.build_directory(home, part=part) as building:
                    build(building)
                    made = files.inside(building).items()
                    sealed = {name: [files.sha256(path), state(path)] for name, path in made}
                    (building / SEAL).write_text(json.dumps(sealed), encoding="utf-8")
            elif part:
                files.remove(part)
        if fault := _fault(home):
            raise UserError(f"{home} cannot be made again, but {fault}: give a data.cache_dir")
    return home


@contextlib.contextmanager
def _alone(part: Path, home: Path, assist: Build) -> Iterator[Path | None]:
    """The folder `part`, to build `home` in, while no other process has it.

    None where the file system has no locks. A process that is killed leaves what is in the folder.
    """
    while True:
        try:
            files.make_private(part)
            handle = os.open(part, os.O_RDONLY)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not part.is_symlink():
                continue  # it was there, and whoever held it has moved or removed it
            wrong = f"data.cache_dir={str(part.parent)!r} cannot be written"
            raise UserError(f"{wrong}: {error}") from error
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that makes {home}", flush=True)
                if _fault(home):  # else that one only removes the folder, in which nothing is made
                    assist(part)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                yield None
                return
            own = False  # where the process that held it has moved it
            with contextlib.suppress(FileNotFoundError):
                own = os.path.samestat(os.stat(part), os.fstat(handle))
            if own:
                yield part
                return
        finally:
            os.close(handle)


def _fault(home: Path) -> str:
    """What is wrong with an entry, or "". Reads only the files whose state is a new one."""
    try:
        if home.is_symlink():
            return "it is a link"
        files.check_private(home)
        held = files.inside(home)
        sealed = files.read_json(home / SEAL, 1 << 26)
        if held.keys() != sealed.keys() | {SEAL}:
            return "its files are not those that were sealed"
        new = {name: at for name in sealed if (at := state(held[name])) != sealed[name][1]}
        for name, at in new.items():
            if files.sha256(held[name]) != sealed[name][0]:
                return f"{name} does not match its checksum"
            sealed[name][1] = at
    except FileNotFoundError:
        return "it is not sealed"
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"it cannot be read: {error}"
    if new:
        with contextlib.suppress(OSError):  # then they are read again next time
            files.write_durably(home / SEAL, json.dumps(sealed))
    return ""


def state(path: Any) -> list[int]:
    """What changes where a file does; nobody can set the time of its last change (ctime)."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
