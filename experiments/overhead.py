"""What an update costs against another model's: its time, side by side on the same machine, and its
memory.

For: ratios. Not for: speed in itself, which is a machine's (`launch.py` logs it).
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.pairs import paired
from ngc_jax import count
from ngc_jax.config import make_model
from ngc_jax.data.tokens import most_tokens
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.training.rounds import make_iteration
from ngc_jax.training.step import init_state, make_train_step


class Overhead(NamedTuple):
    """Of an update."""

    time: float  # as a multiple of the reference's
    memory: float  # peak, as a multiple of the reference's
    peak: int  # bytes, as compiled


def overhead(reference: ConfigDict, configs: Iterable[ConfigDict]) -> Iterator[Overhead]:
    """Compile and measure each beside the reference, of equal batches: the median of pairs, one
    after the other.
    """
    plain, least = update_of(reference)
    batch = jnp.zeros((reference.train.batch_size, 2, reference.data.context), jnp.int32)
    for config in configs:
        update, peak = update_of(config)
        yield Overhead(paired(plain, update, batch).ratio, peak / least, peak)


def model_of(config: ConfigDict) -> LanguageModel:
    """The model of a config, for the vocabulary that its text will have at most."""
    return make_model(config, most_tokens(config.data))


def update_of(config: ConfigDict) -> tuple[Any, int]:
    """A config's update as a function of the batch alone, and its peak memory in bytes."""
    model = model_of(config)
    state = jax.jit(lambda: init_state(model, config.train, 0))()
    batch = jax.ShapeDtypeStruct((config.train.batch_size, 2, config.data.context), jnp.int32)
    iteration = make_iteration(model, config) if isinstance(model, Decoder) else None
    step = jax.jit(make_train_step(model, config.train, iteration=iteration), donate_argnums=0)
    compiled = step.lower(state, batch).compile()

    def update(batch: jax.Array) -> Any:
        nonlocal state
        state, scalars = compiled(state, batch)
        return scalars

    return update, count.peak_memory(compiled)
