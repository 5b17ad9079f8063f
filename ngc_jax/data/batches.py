"""The global batch as a pure function of (seed, step).

For: cutting a token stream into windows, shuffling them anew each epoch, and giving each process its rows of a step's
batch. There is no iterator state: a run that goes on from step s asks for batch s, on any number of processes.
Not for: where tokens come from (`tokens.py`) or where batches go (`mesh.py`).
"""

from collections.abc import Iterator

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
    windows: Windows, *, batch_size: int, seed: int, start: int, stop: int, process: int = 0, processes: int = 1
) -> Iterator[np.ndarray]:
    """This process's rows, [batch_size / processes, context + 1], of the global batches of steps start .. stop - 1.

    Global row r of step s is window number s * batch_size + r of an endless sequence of epochs, each of them a
    permutation of all windows drawn from (seed, epoch). Rows are read ahead on a thread.
    """
    epochs = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    rows = batch_size // processes

    def batch(step: int) -> np.ndarray:
        first = step * batch_size + process * rows
        return np.stack([epochs[first + row] for row in range(rows)])

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(ahead))


def held_out_batches(
    windows: Windows, *, batch_size: int, limit: int = 0, process: int = 0, processes: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows for evaluation, in order: pairs (tokens [rows, context + 1], real [rows] bool).

    `limit` > 0 takes that many, evenly spaced over the text. The last batch is filled up with rows that are not real.
    """
    count = min(limit, len(windows)) if limit else len(windows)
    chosen = np.linspace(0, len(windows) - 1, count).round().astype(int) if limit else np.arange(count)
    rows = batch_size // processes
    for first in range(process * rows, -(-count // batch_size) * batch_size, batch_size):
        index = np.arange(first, first + rows)
        real = index < count
        yield np.stack([windows[chosen[i]] for i in np.minimum(index, count - 1)]), real
