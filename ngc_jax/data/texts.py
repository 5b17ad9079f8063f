"""A user's text: which documents its files have, and which of them are held out or left out.

For: one scan of all files, kept until one changes, and their documents by split: as names announce
it, else a share of the bytes. Not for: finding files (`folders.py`), their formats (`sources.py`).
"""

import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import cache, sources
from ngc_jax.data.corpus import Corpus
from ngc_jax.data.folders import OUT, TRAIN, VALIDATION, Skips, announced, listed, note
from ngc_jax.data.unprepared import Span, head_of, plain
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import Advance, amount

VERSION = 1  # of what a scan says
ROW = np.dtype([("digest", "<u8"), ("size", "<u8"), ("part", "u1")])  # of each document
ENOUGH = 0.9  # of the share to hold out: then no document is cut


class Scan(NamedTuple):
    """What is known of all documents; `cut`: (document, byte where its held-out tail begins)."""

    fingerprint: str
    cut: tuple[int, int]
    skips: Skips
    rows: np.ndarray  # [documents] of ROW
    counts: np.ndarray  # [files]: documents in each, 0: the file is skipped


def text_corpus(config: Any, given: str, home: pathlib.Path) -> Corpus:
    """The text in a file, folder or pipe; a pipe's is kept for as long as this is.

    home: the cache. Raises UserError where it is missing, or has no text.
    """
    asked, skips, pipes = f"data.path={given!r}", Skips(), list[Any]()
    top, names = listed(asked, given, home, skips, pipes)
    parts = announced(names)
    held, beside = f"data.validation_path={config.validation_path!r}", list[str]()
    if config.validation_path:
        where, found = listed(held, config.validation_path, home, skips, pipes)
        beside = [os.path.join(where, name) for name in found]
        parts = [OUT if part == VALIDATION else part for part in parts]
    paths, parts = [os.path.join(top, name) for name in names] + beside, parts + [1] * len(beside)
    vocab = config.vocab_size if config.tokenizer == "tokens" else 0
    share = 0.0 if set(parts) - {TRAIN} else config.validation_fraction
    key = hashlib.sha256(repr([VERSION, share, config.text_column, vocab]).encode())
    for path, part in zip(paths, parts, strict=True):
        key.update(f"{path} {part} {_state(path)}\n".encode(errors="surrogateescape"))

    def scan(building: pathlib.Path) -> None:
        _write(_scan(paths, parts, config.text_column, vocab, share), building)

    made = _read(cache.entry(home, f"scan-{key.hexdigest()[:32]}", scan))
    rows = made.rows
    for why, (count, some) in made.skips.items():
        note(skips, why, *some, count=count)
    left = "; ".join(f"{n:,} {why} ({', '.join(some)})" for why, (n, some) in skips.items())
    for part, field in ((TRAIN, asked), (VALIDATION, held)):
        if not np.any(rows["part"] == part) and (part == TRAIN or config.validation_path):
            why = f" ({left})" if left else ""
            raise UserError(f"{field} holds no text{why}: give a file, or a folder of files, of it")

    def read(_kept: object = pipes) -> Iterator[tuple[str, Iterable[bytes]]]:
        number = 0
        try:
            for path, count in zip(paths, made.counts, strict=True):
                documents = sources.documents(path, config.text_column, vocab) if count else ()
                end = number + count
                for document in (d for d in documents if not isinstance(d, str)):
                    row, number = rows[number], number + 1
                    pieces = _checked(document, path, row["digest"])
                    if number - 1 == made.cut[0]:
                        head, tail = sources.head_and_tail(pieces, made.cut[1], 4 * bool(vocab))
                        yield from (("train", head), ("validation", tail))
                    elif row["part"] != OUT:
                        yield ("train", "validation")[row["part"]], pieces
                if number != end:
                    raise UserError(_changed(path))
        except UserError:
            raise
        except sources.faults() as error:
            raise UserError(_changed(path)) from error

    def spans() -> list[Span]:
        if max(made.counts) > 1 or vocab:
            raise UserError(f"data.prepare=False: must be True where {asked} has rows or tokens")
        read = itertools.compress(paths, made.counts)  # a document each
        found = [
            plain(path, int(row["size"])) if row["part"] == TRAIN else None
            for path, row in zip(read, rows, strict=True)
        ]
        if made.cut[0] >= 0 and (cut := found[made.cut[0]]):
            found[made.cut[0]] = head_of(cut, made.cut[1])
        return [span for span in found if span]

    size = int(rows["size"][rows["part"] != OUT].sum())
    by = "by name, " if share == 0 and not beside else ""
    about = f"text: {_sizes(made)}, {by}fingerprint {made.fingerprint[:16]}"
    about += f"; left out: {left}" if left else ""
    return Corpus(made.fingerprint, read, size, about, spans)


def _state(path: str) -> list[int]:
    try:
        return cache.state(path)
    except OSError:
        return []


def _scan(paths: list[str], parts: list[int], column: str, vocab: int, share: float) -> Scan:
    """Reads all documents once. Raises UserError for a column or a package that is missing."""
    digest, skips, counts = hashlib.sha256(), Skips(), list[int]()
    made, number = np.zeros(1024, ROW), 0
    packed = any({".parquet", *sources.PACKED} & {*sources.suffixes(path)} for path in paths)
    sizes = map(_state, [] if packed else paths)
    advance = Advance("reading text", sum(size[0] for size in sizes if size))
    for path, part in zip(paths, parts, strict=True):
        before, noted, safe = number, Skips(), digest.copy()
        try:
            for document in sources.documents(path, column, vocab):
                if isinstance(document, str):
                    note(noted, document, os.path.basename(path))
                    continue
                own, size = hashlib.sha256(), 0
                for piece in document:
                    own.update(piece)
                    size += len(piece)
                    advance.add(len(piece))
                if not size:
                    raise sources.Skipped("empty")
                if number == len(made):
                    made = np.concatenate([made, np.zeros_like(made)])
                first = int.from_bytes(own.digest()[:8], "little")
                made[number] = first, size, part
                digest.update(own.digest())
                number += 1
        except UserError:
            raise
        except sources.faults() as error:  # then nothing of the file is read
            number, digest, name = before, safe, os.path.basename(path)
            why, told = str(error), name
            if not isinstance(error, sources.Skipped):
                reason = (str(error) or type(error).__name__).splitlines()[0][:80]
                why, told = "unreadable", f"{name}: {reason}"
            noted = {why: [1, [told]]}
        counts.append(number - before)
        for why, (count, some) in noted.items():
            note(skips, why, *some, count=count)
    rows = made[:number].copy()
    # Of equal documents one stays: one that is held out, else the first.
    first_held = np.array([1, 0, 2])[rows["part"]]
    order = np.lexsort((first_held, rows["digest"]))
    twice = order[1:][rows["digest"][order[1:]] == rows["digest"][order[:-1]]]
    other = np.flatnonzero(rows["part"] == OUT)
    for which, why in ((other, "of another split"), (np.setdiff1d(twice, other), "duplicate")):
        if len(which):
            of = np.searchsorted(np.cumsum(counts), which[:3], side="right")
            note(skips, why, *(os.path.basename(paths[i]) for i in of), count=len(which))
    rows["part"][twice] = OUT
    cut = _hold_out(rows, share)
    digest.update(rows["part"].tobytes() + repr(cut).encode())
    return Scan(digest.hexdigest(), cut, skips, rows, np.array(counts, np.int64))


def _hold_out(rows: np.ndarray, share: float) -> tuple[int, int]:
    """Holds out documents of the smallest digests, of this share of all bytes; see `Scan.cut`.

    Where whole documents are far from that share, the tail of the next one is held out as well.
    """
    free = np.flatnonzero(rows["part"] == TRAIN)
    if not share or not len(free):
        return -1, 0
    order = free[np.argsort(rows["digest"][free], kind="stable")]
    ends = np.cumsum(rows["size"][order].astype(np.int64))
    wanted = round(int(ends[-1]) * share)
    whole = int(np.searchsorted(ends, wanted, side="right"))
    rows["part"][order[:whole]] = VALIDATION
    held = int(ends[whole - 1]) if whole else 0
    if held >= ENOUGH * wanted:
        return -1, 0
    return int(order[whole]), int(rows["size"][order[whole]]) - (wanted - held)


def _write(found: Scan, home: pathlib.Path) -> None:
    np.save(home / "documents.npy", found.rows)
    np.save(home / "counts.npy", found.counts)
    told = {"fingerprint": found.fingerprint, "cut": found.cut, "skips": found.skips}
    (home / "scan.json").write_text(json.dumps(told), encoding="utf-8")


def _read(home: pathlib.Path) -> Scan:
    told = files.read_json(home / "scan.json", 1 << 26)
    rows, counts = (np.load(home / f"{name}.npy") for name in ("documents", "counts"))
    return Scan(told["fingerprint"], tuple(told["cut"]), told["skips"], rows, counts)


def _checked(document: Iterable[bytes], path: str, digest: int) -> Iterator[bytes]:
    """The pieces of a document, which must be those of the scan. Raises UserError."""
    own = hashlib.sha256()
    try:
        for piece in document:
            own.update(piece)
            yield piece
    except UserError:
        raise
    except sources.faults() as error:
        raise UserError(_changed(path)) from error
    if int.from_bytes(own.digest()[:8], "little") != digest:
        raise UserError(_changed(path))


def _changed(path: str) -> str:
    return f"{path} has changed while it was read: give the command again"


def _sizes(found: Scan) -> str:
    told = []
    for part, name in enumerate(("train", "validation")):
        rows = found.rows[found.rows["part"] == part]
        count, size = len(rows), int(rows["size"].sum())
        if found.cut[0] >= 0:
            tail = int(found.rows["size"][found.cut[0]]) - found.cut[1]
            size += tail if part == VALIDATION else -tail
            count += part == VALIDATION
        told.append(f"{name} {count:,} document{'s' * (count != 1)} {amount(size, 'B')}")
    return ", ".join(told)
