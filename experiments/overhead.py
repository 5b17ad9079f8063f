"""The cost of an update relative to another model's: time, measured alternately on one machine, and
memory.

For: ratios. Not for: absolute speed, which depends on the machine (`launch.py` logs it).
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ngc_jax import count
from ngc_jax.config import make_model
from ngc_jax.data.batches import token_batch
from ngc_jax.data.tokens import most_tokens, segmented
from ngc_jax.training.rounds import make_iteration, mark_of
from ngc_jax.training.step import init_state, make_train_step

PAIRS = 9  # of updates, one of each model


class Overhead(NamedTuple):
    """Of an update."""

    time: float  # as a multiple of the reference's
    memory: float  # peak, as a multiple of the reference's
    peak: int  # bytes, as compiled


class Update:
    """The compiled update of a config, on a batch of its shape that is all zeros."""

    def __init__(self, config: ConfigDict):
        model, rows = make_model(config, most_tokens(config.data)), config.train.batch_size
        shapes = token_batch(rows, config.data.context, segmented(config.data, mark_of(config)))
        self.batch = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        self.state: Any = jax.jit(lambda: init_state(model, config.train, 0))()
        step = make_train_step(model, config.train, iteration=make_iteration(model, config))
        jitted = jax.jit(step, donate_argnums=0)
        self.compiled = jitted.lower(self.state, self.batch).compile()
        self.peak = count.peak_memory(self.compiled)

    def seconds(self) -> float:
        """Makes an update, and returns the seconds that it took."""
        began = time.perf_counter()
        self.state, _ = jax.block_until_ready(self.compiled(self.state, self.batch))
        return time.perf_counter() - began


def overhead(reference: ConfigDict, configs: Iterable[ConfigDict]) -> Iterator[Overhead]:
    """The overhead of each config over the reference, for equal batches: the median of pairs."""
    plain = Update(reference)
    for config in configs:
        other = Update(config)
        pairs = [(plain.seconds(), other.seconds()) for _ in range(1 + PAIRS)]
        ratio = statistics.median(b / a for a, b in pairs[1:])  # the first pair warms up
        yield Overhead(ratio, other.peak / plain.peak, other.peak)
