"""The global batch as a pure function of (seed, step).

For: cutting a token stream into windows, shuffling them anew each epoch, and reading the rows of a step's batch that a
process needs. There is no iterator state: a run that goes on from step s asks for batch s, on any number of processes.
Not for: where tokens come from (`tokens.py`), where batches go or whose rows are which (`mesh.py`).
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np


class Windows:
    """A token stream as windows of `context` tokens and the one after: [context + 1] int32, next to one another."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, index: int) -> np.ndarray:
        start = index * self.context
        return self.tokens[start : start + self.context + 1].astype(np.int32)


def train_batches(
    windows: Windows, *, batch_size: int, seed: int, start: int, stop: int, rows: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """These rows (None: all), [rows, context + 1], of the global batches of steps start .. stop - 1.

    Global row r of step s is window number s * batch_size + r of an endless sequence of epochs, each of them a
    permutation of all windows drawn from (seed, epoch). Rows are read ahead on a thread.
    """
    epochs = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    wanted = range(batch_size) if rows is None else rows

    def batch(step: int) -> np.ndarray:
        return np.stack([epochs[step * batch_size + int(row)] for row in wanted])

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(ahead))


def held_out_batches(
    windows: Windows, *, batch_size: int, limit: int = 0, rows: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows for evaluation, in order: pairs (tokens [rows, context + 1], real [rows] bool).

    `limit` > 0 takes that many, evenly spaced over the text. The last batch is filled up with rows that are not real.
    `rows` of each batch (None: all).
    """
    count = min(limit, len(windows)) if limit else len(windows)
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int) if limit else np.arange(count)
    wanted = np.arange(batch_size) if rows is None else np.asarray(rows)
    for first in range(0, count, batch_size):
        index = first + wanted
        real = index < count
        yield np.stack([windows[chosen[i]] for i in np.minimum(index, count - 1)]), real
