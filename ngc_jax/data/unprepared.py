"""A text to train on whose tokens are made when they are asked for: `data.prepare=False`.

For: windows of plain files at random places; one is a function of its number alone, so batches are
the same at any number of processes, and nothing is written. Not for: held-out text, which is always
prepared (`token_files.py`).
"""

import codecs
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.data.batches import Batch, window
from ngc_jax.data.cache import state
from ngc_jax.runtime.errors import UserError

LATER = bytes(range(0x80, 0xC0))  # bytes of a character of UTF-8 but its first
SAMPLED = 1 << 20  # bytes, of the beginning, that say how many of them a token has


class Span(NamedTuple):
    """Where a document lies: bytes `begin` .. `begin + size - 1` of a file."""

    path: str
    begin: int
    size: int


class Unprepared:
    """Windows [context] of documents in a row, each after its mark.

    Of a tokenizer of bytes they are those of the prepared text. Of others, example i is made of as
    many bytes as have `context` tokens on average, from i times as many on: what is more than a
    window is cut off, and what is missing is filled, and nothing is asked there.
    """

    def __init__(self, spans: Sequence[Span], tokenizer: Any, context: int, boundary: int | None):
        self.tokenizer, self.context, self.boundary = tokenizer, context, boundary
        self.spans, self.states = [*spans], {span.path: state(span.path) for span in spans}
        self.ends = np.cumsum([1 + span.size for span in spans], dtype=np.int64)
        self.total = int(self.ends[-1]) if self.spans else 0
        self.exact, self.step = not tokenizer.cuts, context
        if not self.exact:
            sample = self._pieces(0, min(self.total, SAMPLED))
            tokens = sum(map(len, tokenizer.encode_all([_whole(raw) for _, raw in sample])))
            self.step = max(1, context * min(self.total, SAMPLED) // max(1, tokens))

    def __len__(self) -> int:
        return max(0, (self.total - self.exact) // self.step)

    def __getitem__(self, index: int) -> Batch:
        pieces = self._pieces(index * self.step, self.step + self.exact)
        texts = [raw if self.exact else _whole(raw) for _, raw in pieces]
        mark, made = np.array([self.tokenizer.mark], np.int32), list[np.ndarray]()
        for (begins, _), tokens in zip(pieces, self.tokenizer.encode_all(texts), strict=True):
            made += [mark[: int(begins)], tokens.astype(np.int32)]
        tokens = np.concatenate(made)[: self.context + 1]
        return window(tokens, self.context, self.tokenizer.mark, self.boundary)

    def _pieces(self, start: int, count: int) -> list[tuple[bool, bytes]]:
        """(whether a document begins here, its bytes) from a place on, a mark being one place."""
        found, stop = list[tuple[bool, bytes]](), min(start + count, self.total)
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            span = self.spans[number]
            at = start - (int(self.ends[number]) - span.size)  # -1: at its mark
            size = min(stop, int(self.ends[number])) - start - (at < 0)
            found.append((at < 0, self._read(span, max(at, 0), size)))
            start, number = min(stop, int(self.ends[number])), number + 1
        return found

    def _read(self, span: Span, at: int, size: int) -> bytes:
        with open(span.path, "rb") as file:
            file.seek(span.begin + at)
            raw = file.read(size)
        if len(raw) < size or state(span.path) != self.states[span.path]:
            wants = "must stay as it is while data.prepare=False reads it"
            raise UserError(f"{span.path} has changed: {wants}; give the command again")
        return raw


def plain(path: str, size: int) -> Span:
    """The document that a whole file is. Raises UserError for a file that is not read in places."""
    with open(path, "rb") as file:
        first = file.read(3)
    begin = 3 * first.startswith(codecs.BOM_UTF8)
    if os.path.getsize(path) != begin + size:
        wants = "every file must be plain text in UTF-8, not packed, and no rows"
        raise UserError(f"data.prepare=False: {wants}: {path}")
    return Span(path, begin, size)


def head_of(span: Span, at: int) -> Span:
    """A document up to byte `at`, or the end of the character there (`sources.head_and_tail`)."""
    with open(span.path, "rb") as file:
        file.seek(span.begin + at)
        after = file.read(min(4, span.size - at))
    return span._replace(size=at + len(after) - len(after.lstrip(LATER)))


def _whole(raw: bytes) -> bytes:
    """Without the parts of characters at both ends, whose others lie before and after."""
    raw = raw.lstrip(LATER)
    begun = len(raw.rstrip(LATER)) - 1  # where the last character begins
    lead = raw[begun] if raw else 0
    long = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    return raw[:begun] if len(raw) - begun < long else raw
