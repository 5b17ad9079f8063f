"""Files and directories that are there whole or not at all, whatever is killed or runs at the same time.

For: `write_durably` a file, `build_directory` a cache entry. Not for: checkpoints, which Orbax writes.
"""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from ngc_jax.errors import UserError


def write_durably(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all, and have it on disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def build_directory(home: pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory to build in, renamed to `home` if the block ends well and removed if it does not.

    A build that is killed leaves nothing that a later one could take for whole. Of two builds at once the second to
    finish is dropped. Raises UserError where nothing can be written.
    """
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        building = pathlib.Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    except OSError as error:
        raise UserError(f"data.cache_dir={str(home.parent)!r} cannot be written: {error}") from error
    try:
        yield building
        for path in building.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # somebody else's build of the same thing came first: theirs stays
            os.rename(building, home)
        if not home.is_dir():
            raise UserError(f"could not move a finished build to {home}: is there a file in its place?")
    except OSError as error:
        raise UserError(f"building {home} failed: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
