"""Files and directories that exist whole or not at all, whatever is killed or runs meanwhile.

For: `write_durably` a file, a `Log` of lines, `build_directory` a cache entry. In a bucket (gs://)
an object is written whole, and nothing is added to it. Not for: checkpoints, which Orbax writes.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from etils import epath

from ngc_jax.runtime.errors import UserError

Path: TypeAlias = pathlib.Path | epath.Path
_HOME = pathlib.Path(__file__).parents[1]
# What has configs/, experiments/ and launch.py: the repository, or their copy in a wheel.
ROOT = _HOME / "shipped" if (_HOME / "shipped").is_dir() else _HOME.parent

HOLDER = ".lock"  # in a work directory, names the process that has locked it


def expand(path: str) -> pathlib.Path:
    """A user's path, with ~ expanded. Raises UserError for the ~name of no user."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path!r} is not a path here: {error}") from error


def place(path: str | os.PathLike[str]) -> epath.Path:
    """A user's path, in a bucket too, with ~ expanded. Raises UserError as `expand` does."""
    given = os.fspath(path)
    return epath.Path(given if "://" in given else expand(given))


def in_bucket(path: Path) -> bool:
    """Whether a path is a bucket's, such as "gs://...", and not a file system's."""
    return "://" in os.fspath(path)


def inside(directory: Path) -> dict[str, Path]:
    """All files below a directory, by their names in it. Raises OSError for a link or a pipe."""
    found, left = dict[str, Path](), [directory]
    while left:
        for path in left.pop().iterdir():
            name = path.relative_to(directory).as_posix()
            mode = stat.S_IFREG if in_bucket(path) else os.lstat(path).st_mode
            if path.is_dir() if in_bucket(path) else stat.S_ISDIR(mode):
                left.append(path)
            elif stat.S_ISREG(mode):
                found[name] = path
            else:
                raise OSError(f"{name} is neither a file nor a directory")
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def no_follow(path: str, flags: int) -> int:
    """Opens a path for `open(..., opener=no_follow)`. Raises OSError where it is a link."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)


def read(path: Path, limit: int) -> bytes:
    """A file's content. Raises OSError for a link, a pipe, a device, or more bytes than `limit`."""
    if in_bucket(path):
        return path.read_bytes()
    with open(path, "rb", opener=no_follow) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no file")
        if found.st_size > limit:
            raise OSError(f"{path} has {found.st_size} bytes, more than the {limit} allowed")
        return file.read(limit)


def read_json(path: Path, limit: int, hook: Callable[[Any], Any] | None = None) -> Any:
    """What a JSON file in UTF-8 holds; see `read`. Raises ValueError for another. hook: of json."""
    try:  # json.loads(bytes) would guess an encoding
        return json.loads(read(path, limit).decode(), object_hook=hook)
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error


def make_private(directory: pathlib.Path) -> None:
    """Makes a directory that is its user's alone. Raises OSError where others may write to it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        directory.mkdir(0o700)
    check_private(directory)


def check_private(directory: pathlib.Path) -> None:
    """Raises OSError for what is no directory, is another user's, or may be changed by others."""
    found = os.stat(directory)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{directory} is no directory")
    if found.st_uid not in (0, os.getuid()):
        raise PermissionError(f"{directory} belongs to another user, number {found.st_uid}")
    # In a sticky directory, such as /tmp, one changes what is one's own alone.
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        mode = f"mode {stat.S_IMODE(found.st_mode):o}"
        raise PermissionError(f"others may write to {directory} ({mode}): chmod go-w it")


def remove(path: Path) -> None:
    """Removes a file, or a directory with all in it, as far as it can; of a link, only the link."""
    with contextlib.suppress(OSError, RecursionError):
        if in_bucket(path):
            epath.Path(path).rmtree(missing_ok=True)
        elif os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def move(directory: Path, to: Path) -> None:
    """Renames a directory, over an existing one. Raises OSError where `to` is inside a link."""
    if in_bucket(directory):
        for name, path in inside(directory).items():
            epath.Path(path).copy(to / name, overwrite=True)
        remove(directory)
        return
    to.parent.mkdir(exist_ok=True)
    if os.path.islink(to.parent):
        raise OSError(f"{to.parent} is a link, which is not followed: remove it")
    remove(to)
    os.replace(directory, to)
    sync(directory.parent)
    sync(to.parent)


def write_durably(path: Path, content: str | bytes | Callable[[Any], Any]) -> None:
    """Writes a file whole or not at all; it and its name are on disk when this returns.

    content: also a function that writes to the open file, for what should not be in memory twice.
    What a text has that is not UTF-8, part of a file's name say, is escaped.
    """
    content = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    fill = content if callable(content) else lambda file: file.write(content)
    if in_bucket(path):
        with path.open("wb") as file:
            fill(file)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb", opener=no_follow) as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Puts a file's content, or a directory's entries, on disk: a rename is safe only then."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that has no such sync
            raise
    finally:
        os.close(handle)


class Log:
    """A file that begins with a text and grows by lines. In a bucket each `sync` rewrites it."""

    def __init__(self, path: Path, text: str):
        write_durably(path, text)
        self._path, self._file, self._unwritten = path, None, b""
        if in_bucket(path):
            self._unwritten = text.encode()  # stays all lines
        else:
            self._file = open(path, "ab", 0, opener=no_follow)  # noqa: SIM115 (closed by close())

    def add(self, line: str) -> None:
        """Adds a line. A full disk raises no error yet."""
        self._unwritten += line.encode()
        with contextlib.suppress(OSError):
            self._write()

    def sync(self) -> None:
        """Puts all lines on disk. Raises OSError where that cannot be; they are kept."""
        self._write()
        if self._file:
            os.fsync(self._file.fileno())
        else:
            write_durably(self._path, self._unwritten)

    def close(self) -> None:
        self.sync()
        if self._file:
            self._file.close()

    def _write(self) -> None:
        while self._file and self._unwritten:  # a disk that fills up takes a part
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


@contextlib.contextmanager
def build_directory(
    home: pathlib.Path, of: str = "data.cache_dir", part: pathlib.Path | None = None
) -> Iterator[pathlib.Path]:
    """A directory to build in, renamed to `home` in the end, or removed. Raises UserError.

    of: what the user calls the directory that `home` is in. part: the directory to build in, which
    stays where the process is killed or interrupted; None: a new one.
    """
    wrong, building = f"{of}={str(home.parent)!r} cannot be written", None
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        building = part or pathlib.Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
        wrong = f"building {home} failed"
        yield building
        for path in (building, *building.rglob("*")):
            sync(path)
        with contextlib.suppress(OSError):  # another build of the same thing came first and stays
            os.rename(building, home)
            sync(home.parent)
        if not home.is_dir():
            raise UserError(f"cannot move a finished build to {home}: is a file in its place?")
    except OSError as error:
        raise UserError(f"{wrong}: {error}") from error
    except KeyboardInterrupt:
        building = None if part else building
        raise
    finally:
        if building:
            remove(building)
