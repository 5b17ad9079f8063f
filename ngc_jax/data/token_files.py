"""From documents to files of tokens, in parts that all processes share among them.

For: the tokens of each split, the same to the bit however many processes make them, and whichever
are killed. Not for: which corpora there are (`corpora.py`), or where tokens end (`tokens.py`).
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import sources
from ngc_jax.data.corpora import Mixed
from ngc_jax.runtime import files
from ngc_jax.runtime.metrics import Advance

BATCH = 1 << 22  # bytes that are encoded at once
PART = 64  # batches that one process makes while others make others
SAVED = 5.0  # seconds between two places from which a killed preparation goes on
SPLITS = ("train", "validation")
DAMAGED = (OSError, ValueError, TypeError, LookupError, AttributeError)  # a journal may be

Pieces = list[tuple[str, bool, bytes]]  # (file, whether a document begins, bytes)


class Made(NamedTuple):
    """What is on disk of a part: its first batches, and the size and checksum of each file."""

    batches: int
    sums: dict[str, list[int]]
    whole: bool = False


class TokenFiles:
    """The tokens of these splits of corpora, to be written in the folder `building`.

    They are made in parts, beside it. A process makes the parts that no other one has made or is
    making, in order; it reads the text of the others, but does not encode it. Parts stay where a
    process is killed or interrupted. Raises UserError, UnicodeDecodeError.
    """

    def __init__(
        self, mixed: Mixed, tokenizer: Any, building: pathlib.Path, wanted: tuple[str, ...] = SPLITS
    ):
        self.mixed, self.tokenizer, self.building, self.wanted = mixed, tokenizer, building, wanted
        self.parts = building.with_name(f"{building.name}s")
        self.dtype = np.dtype("uint16" if tokenizer.vocab <= 1 << 16 else "uint32")
        self.names = [name_of(split, i) for split in wanted for i in range(len(mixed.parts))]

    def write(self) -> None:
        """Writes {train,validation}[1, ...].bin and meta.json."""
        try:
            self._join(*self._make())
        except KeyboardInterrupt:
            raise
        except BaseException:
            files.remove(self.parts)
            raise
        files.remove(self.parts)

    def help(self) -> None:
        """Makes parts for the process that writes."""
        with contextlib.suppress(OSError):  # it may be done at any time
            self._make()
        if self._done:
            files.remove(self.parts)

    @property
    def _done(self) -> bool:
        return not self.building.exists() or (self.building / "meta.json").exists()

    def _make(self) -> tuple[int, list[int]]:
        """Makes parts; how many there are, and which of them others were making meanwhile."""
        files.make_private(self.parts)
        size = sum(part.size for part in self.mixed.parts) if self.wanted == SPLITS else 0
        advance, count, others = Advance("making tokens", size), 0, list[int]()
        batches = enumerate(_batches(self.mixed, self.tokenizer.cuts, self.wanted))
        for number, part in itertools.groupby(batches, lambda one: one[0] // PART):
            with _claimed(self.parts / str(number)) as home:
                made = self._begun(home) if home else Made(PART, {})
                if self._done:  # and so this part may be gone: whoever is done removes them
                    break
                count = number + 1
                if home is None:
                    others.append(number)
                self._make_part(home, made, (batch for _, batch in part), advance)
        return count, others

    def _make_part(
        self, home: pathlib.Path | None, made: Made, batches: Iterable[Pieces], advance: Advance
    ) -> None:
        """Makes what is missing of a part; None: it is another's, and its text is passed over."""
        saved = time.monotonic()
        for number, batch in enumerate(batches):
            passed = number < made.batches
            advance.add(sum(len(piece) for _, _, piece in batch), passed)
            if home is None or passed:
                continue
            made = Made(number + 1, self._added(home, batch, made.sums))
            if time.monotonic() - saved > SAVED:
                _save(home, made)
                saved = time.monotonic()
        if home and not made.whole:
            _save(home, made._replace(whole=True))

    def _added(
        self, home: pathlib.Path, batch: Pieces, sums: dict[str, list[int]]
    ) -> dict[str, list[int]]:
        """The sizes and checksums of a part's files after a batch, which is added to them."""
        tokenizer = self.tokenizer
        mark = np.array([tokenizer.mark] if tokenizer.mark >= 0 else [], self.dtype).tobytes()
        raw = {name: list[bytes]() for name in self.names}
        encoded = tokenizer.encode_all([piece for _, _, piece in batch])
        for (name, begins, _), tokens in zip(batch, encoded, strict=True):
            raw[name].append(mark * begins + tokens.astype(self.dtype).tobytes())
        after = dict(sums)
        for name, more in ((name, b"".join(of)) for name, of in raw.items() if of):
            with open(home / f"{name}.bin", "ab") as file:
                file.write(more)
            size, crc = sums[name]
            after[name] = [size + len(more), zlib.crc32(more, crc)]
        return after

    def _begun(self, home: pathlib.Path) -> Made:
        """What a killed process has made of a part, its files cut to that."""
        try:
            made = _journal(home)
            if [*made.sums] != self.names:
                raise ValueError("these are files of others")
            for name, (size, crc) in made.sums.items():
                os.truncate(home / f"{name}.bin", size)
                if _checksum(home / f"{name}.bin") != crc:
                    raise ValueError(f"{name}.bin is damaged")
            if not made.whole:
                print(f"going on with the tokens in {home}", flush=True)
            return made
        except DAMAGED:
            for name in self.names:
                (home / f"{name}.bin").write_bytes(b"")
            return Made(0, {name: [0, 0] for name in self.names})

    def _join(self, count: int, others: list[int]) -> None:
        """Writes the files of all parts, once others have made theirs or were killed at it."""
        while not all(self._waited_for(number) for number in others):
            count, others = self._make()
        sizes = dict.fromkeys(self.names, 0)
        for name in self.names:
            with open(self.building / f"{name}.bin", "wb") as whole:
                for number in range(count):
                    home = self.parts / str(number)
                    size, crc = _journal(home).sums[name]
                    if _checksum(home / f"{name}.bin", whole) != crc:
                        raise OSError(f"{home / name}.bin does not match its checksum")
                    sizes[name] += size
        counts = {name: size // self.dtype.itemsize for name, size in sizes.items()}
        told = json.dumps({"dtype": self.dtype.name, "tokens": counts})
        (self.building / "meta.json").write_text(told, encoding="utf-8")

    def _waited_for(self, number: int) -> bool:
        """Whether another process has made a part, once it is no longer at it."""
        with _claimed(self.parts / str(number), wait=True) as home:
            try:
                return home is not None and _journal(home).whole
            except DAMAGED:  # of one that was killed early, there is none
                return False


def name_of(split: str, part: int) -> str:
    """The file of a split's tokens of this part of a mixture: "train", "train1", ..."""
    return f"{split}{part or ''}"


def _batches(mixed: Mixed, cuts: bool, wanted: tuple[str, ...]) -> Iterator[Pieces]:
    """Pieces of the documents in order, a batch at a time."""
    batch, size = Pieces(), 0
    for i, part in enumerate(mixed.parts):
        for split, pieces in part.read():
            if split not in wanted:
                continue
            begins = True
            for piece in sources.cut(pieces) if cuts else pieces:
                batch.append((name_of(split, i), begins, piece))
                begins, size = False, size + len(piece)
                if size >= BATCH:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


@contextlib.contextmanager
def _claimed(home: pathlib.Path, wait: bool = False) -> Iterator[pathlib.Path | None]:
    """The folder of a part, while no other process has it; None: one has."""
    files.make_private(home)
    handle, own = os.open(home, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            own = False
        except OSError:  # a file system without locks, on which nobody shares (`cache.entry`)
            pass
        yield home if own else None
    finally:
        os.close(handle)


def _save(home: pathlib.Path, made: Made) -> None:
    for name in made.sums:
        files.sync(home / f"{name}.bin")
    files.write_durably(home / "journal.json", json.dumps(made))


def _journal(home: pathlib.Path) -> Made:
    return Made(*files.read_json(home / "journal.json", 1 << 20))


def _checksum(path: pathlib.Path, copy: Any = None) -> int:
    """The CRC-32 of a file, whose bytes are also written to an open one, if given."""
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            crc = zlib.crc32(piece, crc)
            if copy:
                copy.write(piece)
    return crc
