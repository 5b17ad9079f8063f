"""Documents packed into windows by best fit, so that few are cut, and no window begins in one.

For: training on documents, `data.packing='best-fit'`. Not for: a stream cut into windows
(`batches.Windows`), which held-out text stays.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best fit decreasing).
"""

import itertools
import pathlib

import numpy as np

from ngc_jax.data import NOTHING
from ngc_jax.data.batches import Batch, next_token_targets

PIECE = 1 << 24  # tokens that are searched for marks at once


class Packed:
    """Windows of whole documents, [context]; a longer one is cut into windows and a rest.

    home: what `write` has made of these tokens. apart: whether a token sees its own document only.
    No target is `mark`; nothing is asked in the filling at the end of a window.
    """

    def __init__(
        self, tokens: np.ndarray, home: pathlib.Path, context: int, mark: int, apart: bool
    ):
        self.tokens, self.context, self.mark, self.apart = tokens, context, mark, apart
        names = ("starts", "lengths", "windows")
        self.spans = [np.load(home / f"{name}.npy", mmap_mode="r") for name in names]

    def __len__(self) -> int:
        return len(self.spans[2]) - 1

    def __getitem__(self, index: int) -> Batch:
        starts, lengths, windows = self.spans
        inputs = np.zeros(self.context, np.int32)
        targets, segments = np.full_like(inputs, NOTHING), np.full_like(inputs, -1)
        mine, at = slice(windows[index], windows[index + 1]), 0
        for i, (first, count) in enumerate(zip(starts[mine], lengths[mine], strict=True)):
            span = self.tokens[first : first + count + 1].astype(np.int32)
            asked = next_token_targets(span, self.mark)  # of the last token there may be none
            inputs[at : at + count], segments[at : at + count] = span[:count], i
            targets[at : at + len(asked)] = asked
            at += count
        return Batch(inputs, targets, segments if self.apart else None)


def write(tokens: np.ndarray, mark: int, context: int, to: pathlib.Path) -> None:
    """Writes TO/{starts,lengths}.npy: spans; and windows.npy: the first span of each window."""
    pieces = range(0, len(tokens), PIECE)
    marks = [np.flatnonzero(tokens[i : i + PIECE] == mark) + i for i in pieces]
    ends = np.append(np.concatenate(marks)[1:], len(tokens))
    begins = np.concatenate([[0], ends[:-1]])
    counts = -(-(ends - begins) // context)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(begins, counts) + nth * context
    lengths = np.minimum(np.repeat(ends, counts) - starts, context).astype(np.int32)
    window = best_fit(lengths, context)
    order = np.argsort(window, kind="stable")
    np.save(to / "starts.npy", starts[order])
    np.save(to / "lengths.npy", lengths[order])
    np.save(to / "windows.npy", np.searchsorted(window[order], np.arange(window.max() + 2)))


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """The bin of each item: the longest item first, each where it leaves the least room.

    lengths: int [items], of 1 to `size`. Items of one length are placed together, with the result
    of one after another: the bin with the least room stays that until it is full.
    """
    order = np.argsort(-lengths, kind="stable")
    bins, made = np.empty(len(lengths), np.int64), 0
    room = dict[int, list[np.ndarray]]()  # room that is left -> bins
    edges = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0))
    for first, end in itertools.pairwise(edges):
        items = order[first:end]
        length = int(lengths[items[0]])
        for left in [*sorted(r for r in room if r >= length), size]:
            each = left // length
            need = -(-len(items) // each)
            if left == size:
                open_, rest = np.arange(made, made + need), np.arange(0)
                made += need
            else:
                whole = np.concatenate(room.pop(left))
                open_, rest = whole[:need], whole[need:]
            taken = min(len(items), each * len(open_))
            bins[items[:taken]] = np.repeat(open_, each)[:taken]
            full, over = divmod(taken, each)
            for to, some in ((left - each * length, open_[:full]), (left, rest)):
                if to and len(some):
                    room.setdefault(to, []).append(some)
            if over:
                room.setdefault(left - over * length, []).append(open_[full:])
            items = items[taken:]
            if not len(items):
                break
    return bins
