"""The global batch as a pure function of (seed, step).

For: cutting a token stream into windows, shuffling examples anew each epoch, and reading the rows
of a step's batch that a process needs. There is no iterator state: a run that goes on from step s
asks for batch s, on any number of processes. Not for: where tokens and problems come from
(`tokens.py`, `problems.py`), where batches go or whose rows are which (`mesh.py`).

An example is [2, context] int32: what is read, and what is asked at each position, NOTHING where
nothing is.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import grain
import numpy as np

from ngc_jax.data import NOTHING


class Examples(Protocol):
    """What batches are made of: a sequence of arrays [2, context] int32, inputs and targets."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> np.ndarray: ...


class Windows:
    """A token stream as windows of `context` tokens, next to one another, and the targets of
    `foretold`.
    """

    def __init__(self, tokens: np.ndarray, context: int, mark: int = NOTHING):
        self.tokens, self.context, self.mark = tokens, context, mark

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.context
        return next_token_targets(
            self.tokens[start : start + self.context + 1].astype(np.int32), self.mark
        )


def next_token_targets(tokens: np.ndarray, mark: int = NOTHING) -> np.ndarray:
    """Tokens [..., T + 1] as examples [..., 2, T]: the target of each token is the one after it.

    `mark` begins a document: it cannot be foreseen and is no text, so it is read, but never a
    target.
    """
    targets = tokens[..., 1:]
    return np.stack([tokens[..., :-1], np.where(targets == mark, NOTHING, targets)], axis=-2)


def train_batches(
    examples: Examples,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    rows: Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """These rows (None: all), [rows, 2, context], of the global batches of steps start .. stop - 1.

    Global row r of step s is example number s * batch_size + r of an endless sequence of epochs,
    each of them a permutation of all examples drawn from (seed, epoch). Rows are read ahead on a
    thread.
    """
    epochs = grain.MapDataset.source(examples).seed(seed).shuffle().repeat()
    wanted = range(batch_size) if rows is None else rows

    def batch(step: int) -> np.ndarray:
        return np.stack([epochs[step * batch_size + int(row)] for row in wanted])

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(ahead))


def held_out_batches(
    examples: Examples, *, batch_size: int, limit: int = 0, rows: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Examples for evaluation, in order: pairs (batch [rows, 2, context], real [rows] bool).

    `limit` > 0 takes that many, evenly spaced over them. The last batch is filled up with rows that
    are not real. `rows` of each batch (None: all).
    """
    count = min(limit, len(examples)) if limit else len(examples)
    chosen = (
        np.linspace(0, len(examples) - 1, count).round().astype(int) if limit else np.arange(count)
    )
    wanted = np.arange(batch_size) if rows is None else np.asarray(rows)
    for first in range(0, count, batch_size):
        index = first + wanted
        real = index < count
        yield np.stack([examples[chosen[i]] for i in np.minimum(index, count - 1)]), real
