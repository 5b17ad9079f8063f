"""The global batch as a pure function of (seed, step), so that no iterator has a state to keep.

For: what a batch is, and a process's rows of it. Not for: where batches go (`nn/mesh.py`).
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.data import NOTHING

Rows = Sequence[int] | None  # of a batch; None: all


@flax.struct.dataclass
class Batch:
    """What a model reads and what is asked of it. An example is the same without the axis B.

    inputs: what the model's `embed` reads, for a language model tokens int32 [B, T], of images
    float32 [B, S, S, C]. targets: int32 [B, T], NOTHING where nothing is asked; of images [B, 1].
    segments: int32 [B, T], documents numbered, where a token sees its own alone; None: it sees all.
    """

    inputs: Any
    targets: Any = None
    segments: Any = None


class Examples(Protocol):
    """What batches are made of: a sequence of examples, whose arrays are NumPy's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Batch: ...


@runtime_checkable
class Varying(Examples, Protocol):
    """Examples that training changes at random, each time that it takes one."""

    def vary(self, example: Batch, rng: np.random.Generator) -> Batch: ...


class Windows:
    """Windows of a token stream, [context]; no target is `mark`, none sees past `boundary`.

    filled: the rest, shorter than a window, is one as well, in whose filling nothing is asked.
    """

    filled = False

    def __init__(
        self, tokens: np.ndarray, context: int, mark: int = NOTHING, boundary: int | None = None
    ):
        self.tokens, self.context, self.mark, self.boundary = tokens, context, mark, boundary

    def __len__(self) -> int:
        return (len(self.tokens) - 1 + self.filled * (self.context - 1)) // self.context

    def __getitem__(self, index: int) -> Batch:
        start = index * self.context
        tokens = self.tokens[start : start + self.context + 1].astype(np.int32)
        return window(tokens, self.context, self.mark, self.boundary)


def window(tokens: np.ndarray, context: int, mark: int, boundary: int | None) -> Batch:
    """The example [context] of context + 1 tokens, or fewer, and then filled at its end."""
    targets, missing = next_token_targets(tokens, mark), context + 1 - len(tokens)
    inputs = np.pad(tokens[:-1], (0, missing))
    targets = np.pad(targets, (0, missing), constant_values=NOTHING)
    return Batch(inputs, targets, segments_of(inputs, boundary))


class Mixture:
    """Examples of several parts: one part after another; when trained on, by shares."""

    def __init__(self, parts: Sequence[Examples], shares: Sequence[Fraction]):
        self.parts, self.shares = parts, shares

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Batch:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError


def filled(examples: Examples) -> Examples:
    """The same, but every token is a target once: also those of the rest, see `Windows`."""
    if isinstance(examples, Mixture):
        return Mixture([filled(part) for part in examples.parts], examples.shares)
    if isinstance(examples, Windows):
        examples = copy.copy(examples)
        examples.filled = True
    return examples


def turn(index: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """The part of a mixture that example `index` is of, and which of its examples it is.

    Of the first n examples a part has its share of n, to less than one for each part. Exact.
    """
    for part, own in enumerate(shares[:-1]):
        share = own / sum(shares[part:])
        before = index * share.numerator // share.denominator
        if (index + 1) * share.numerator // share.denominator > before:
            return part, before
        index -= before
    return len(shares) - 1, index


def next_token_targets(tokens: np.ndarray, mark: int = NOTHING) -> np.ndarray:
    """The target of each of tokens [..., T + 1] but the last: the one after it, unless a mark."""
    targets = tokens[..., 1:]
    return np.where(targets == mark, NOTHING, targets)


def segments_of(tokens: np.ndarray, boundary: int | None) -> np.ndarray | None:
    """Documents of tokens [..., T], numbered: how many boundaries there are up to each token."""
    return None if boundary is None else np.cumsum(tokens == boundary, -1, dtype=np.int32)


def answered(targets: jax.Array) -> jax.Array:
    """Which tokens [..., T] have a target at them or after them; a problem's padding has none."""
    return jnp.flip(jnp.cumsum(jnp.flip(targets >= 0, -1), -1), -1) > 0


def token_batch(rows: int, context: int, segmented: bool = False) -> Batch:
    """The shapes of a batch of tokens, for what is compiled before there are data."""
    shape = jax.ShapeDtypeStruct((rows, context), np.int32)
    return Batch(shape, shape, shape if segmented else None)


def abstract_batch(data: Any, rows: int, segmented: bool = False) -> Batch:
    """The shapes of a batch of `config.data`, for what is compiled before there are any."""
    if data.kind == "text":
        return token_batch(rows, data.context, segmented)
    shape = rows, data.image_size, data.image_size, data.colours
    of = jax.ShapeDtypeStruct
    return Batch(of(shape, np.float32), of((rows, 1), np.int32))


def batch_like(examples: Examples, rows: int) -> Batch:
    """The shapes of a batch of so many of these examples."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape), a.dtype), examples[0])


def train_batches(
    examples: Examples, *, batch_size: int, seed: int, start: int, stop: int, rows: Rows = None
) -> Iterator[Batch]:
    """These rows of the global batches of steps start .. stop - 1, read ahead on a thread.

    Row r of step s is example s * batch_size + r of endless epochs, each a permutation of all
    examples drawn from (seed, epoch). Of a mixture each part has epochs of its own, and its `turn`.
    What changes an example (`Varying`) follows from seed, step and row.
    """
    import grain  # a third of a second, which only batches need

    parts, shares = [examples], [Fraction(1)]
    if isinstance(examples, Mixture):
        parts, shares = [*examples.parts], [*examples.shares]
    seeds = [(seed + i) % 2**32 for i in range(len(parts))]
    sources = map(grain.MapDataset.source, parts)
    epochs = [of.seed(own).shuffle().repeat() for of, own in zip(sources, seeds, strict=True)]
    for i, of in enumerate(parts):
        if isinstance(of, Varying):
            epochs[i] = epochs[i].random_map(of.vary)
    wanted = range(batch_size) if rows is None else rows

    def example(index: int) -> Batch:
        part, own = turn(index, shares)
        return epochs[part][own]

    def batch(step: int) -> Batch:
        return _stack(example(step * batch_size + int(row)) for row in wanted)

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(ahead))


def held_out_batches(
    examples: Examples, *, batch_size: int, limit: int = 0, rows: Rows = None
) -> Iterator[tuple[Batch, np.ndarray]]:
    """All examples, or `limit` evenly spaced: (rows of a batch, which are real and no filling)."""
    count = min(limit, len(examples)) if limit else len(examples)
    chosen = np.linspace(0, len(examples) - 1, count).round().astype(int)
    wanted = np.arange(batch_size) if rows is None else np.asarray(rows)
    for first in range(0, count, batch_size):
        index = first + wanted
        real = index < count
        yield _stack(examples[chosen[i]] for i in np.minimum(index, count - 1)), real


def _stack(examples: Iterable[Batch]) -> Batch:
    return jax.tree.map(lambda *arrays: np.stack(arrays), *examples)
