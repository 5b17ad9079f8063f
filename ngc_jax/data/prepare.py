"""From corpora to files of tokens: streamed, on all cores, shown, and continued after a kill.

For: which corpora `config.data` names, mixed or alone; the tokens of each of their splits. Not for:
tokenizers (`tokenizer.py`), or windows of tokens (`batches.py`).
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import time
import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data import corpus, sources, texts
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import Advance

BATCH = 1 << 22  # bytes that are encoded at once
SAVED = 5.0  # seconds between two places from which a killed preparation goes on
LEARN = 1 << 28  # bytes that byte pairs are learned on at most
LINE = 1 << 12  # bytes of a word without spaces of which byte pairs are learned at most
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


class Mixed(NamedTuple):
    """The corpora of a run in their order, and the share of each."""

    parts: list[corpus.Corpus]
    shares: list[Fraction]

    @property
    def fingerprint(self) -> str:
        """Of all texts, whatever their shares."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        whole = "".join(part.fingerprint for part in self.parts)
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def summary(self) -> str:
        """What the log says of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].summary
        told = zip(self.shares, self.parts, strict=True)
        return "; ".join(f"{float(share):.4g} of {part.summary}" for share, part in told)


def open_corpora(config: Any, home: pathlib.Path) -> Mixed:
    """The corpora that `config.data` names. Raises UserError if one is missing or unreadable."""
    if config.path and config.tfds_name:
        both = f"data.path={config.path!r} and data.tfds_name={config.tfds_name!r}"
        raise UserError(f"{both} are both set: give one of them")
    if config.tfds_name:
        return Mixed([corpus.prepared(config)], [Fraction(1)])
    if not config.path:
        return Mixed([corpus.library(home)], [Fraction(1)])
    found = [WEIGHTED.fullmatch(part.strip()) for part in config.path.split(",")]
    if os.path.lexists(files.expand(config.path)) or not all(found):
        return Mixed([texts.text_corpus(config, config.path, home)], [Fraction(1)])
    weights = [Fraction(part[2]) for part in found if part]
    if not min(weights):
        raise UserError(f"data.path={config.path!r}: weights must be above 0, such as 'a.txt:0.7'")
    parts = [texts.text_corpus(config, part[1], home) for part in found if part]
    return Mixed(parts, [weight / sum(weights) for weight in weights])


SPLITS = ("train", "validation")


def write_tokens(
    mixed: Mixed, tokenizer: Any, to: pathlib.Path, wanted: tuple[str, ...] = SPLITS
) -> None:
    """Writes the tokens of these splits, TO/{train,validation}[1, ...].bin and TO/meta.json.

    Goes on where a killed call has written TO/journal.json. Raises UserError, UnicodeDecodeError.
    """
    dtype = np.dtype("uint16" if tokenizer.vocab <= 1 << 16 else "uint32")
    mark = np.array([tokenizer.mark] if tokenizer.mark >= 0 else [], dtype).tobytes()
    parts = range(len(mixed.parts))
    splits = [name_of(split, i) for split in wanted for i in parts]
    done, sums = _begun(to, splits)
    with contextlib.ExitStack() as stack:
        opened = {}
        for split in splits:
            opened[split] = stack.enter_context(open(to / f"{split}.bin", "ab"))
            opened[split].truncate(sums[split][0])
        whole = sum(part.size for part in mixed.parts) if wanted == SPLITS else 0
        advance = Advance("making tokens", whole)
        saved = time.monotonic()
        for number, batch in enumerate(_batches(mixed, tokenizer.cuts, wanted)):
            advance.add(sum(len(piece) for _, _, piece in batch), number < done)
            if number < done:
                continue
            made = tokenizer.encode_all([piece for _, _, piece in batch])
            for (split, begins, _), tokens in zip(batch, made, strict=True):
                raw = mark * begins + tokens.astype(dtype).tobytes()
                opened[split].write(raw)
                size, crc = sums[split]
                sums[split] = [size + len(raw), zlib.crc32(raw, crc)]
            done = number + 1
            if time.monotonic() - saved > SAVED:
                _save(to, done, sums, opened)
                saved = time.monotonic()
        _save(to, done, sums, opened)  # for who is killed before the seal is there
    counts = {split: size // dtype.itemsize for split, (size, _) in sums.items()}
    told = json.dumps({"dtype": dtype.name, "tokens": counts})
    (to / "meta.json").write_text(told, encoding="utf-8")


def name_of(split: str, part: int) -> str:
    """The file of a split's tokens of this part of a mixture: "train", "train1", ..."""
    return f"{split}{part or ''}"


def sample(mixed: Mixed) -> Iterator[str]:
    """The text to learn byte pairs on: of all that is trained on, at most LEARN, evenly spread."""
    size = sum(part.size for part in mixed.parts)
    advance, every, number = Advance("learning byte pairs from", size), max(1, -(-size // LEARN)), 0
    for part in mixed.parts:
        for split, pieces in part.read():
            for piece in sources.cut(pieces) if split == "train" else ():
                advance.add(len(piece))
                number += 1
                if number % every == 0:
                    yield from (line.decode() for line in sources.cut([piece], LINE))


def _batches(
    mixed: Mixed, cuts: bool, wanted: tuple[str, ...]
) -> Iterator[list[tuple[str, bool, bytes]]]:
    """Pieces of the documents in order: (file, whether a document begins, bytes)."""
    batch, size = list[tuple[str, bool, bytes]](), 0
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


def _save(to: pathlib.Path, done: int, sums: dict[str, list[int]], opened: dict[str, Any]) -> None:
    for file in opened.values():
        file.flush()
        os.fsync(file.fileno())
    files.write_durably(to / "journal.json", json.dumps([done, sums]))


def _begun(to: pathlib.Path, splits: list[str]) -> tuple[int, dict[str, list[int]]]:
    """Batches that a killed preparation has made, and the size and checksum of each file."""
    try:
        done, sums = files.read_json(to / "journal.json", 1 << 20)
        for split in splits:
            left, crc = sums[split][0], 0
            with open(to / f"{split}.bin", "rb") as file:
                while left and (piece := file.read(min(left, 1 << 20))):
                    left, crc = left - len(piece), zlib.crc32(piece, crc)
            if [left, crc] != [0, sums[split][1]]:
                raise ValueError(f"{split}.bin is damaged")
        print(f"going on with the tokens in {to}", flush=True)
        return done, sums
    except (OSError, ValueError, TypeError, LookupError):
        return 0, {split: [0, 0] for split in splits}
