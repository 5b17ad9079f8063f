"""What an update costs against another model's: its time, side by side on the same machine, and its memory.

For: ratios. Not for: speed in itself, which is a machine's (`launch.py` logs it).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.exponents import ratio
from ngc_jax import count
from ngc_jax.config import make_model
from ngc_jax.data.tokens import Bytes
from ngc_jax.steps import init_state, make_train_step


class Overhead(NamedTuple):
    """Of an update, as multiples of the reference's."""

    time: float
    memory: float  # peak, as compiled


def overhead(config: ConfigDict, reference: ConfigDict) -> Overhead:
    """Compile both and measure: time is the median of pairs, one after the other."""
    (plain, less), (other, more) = _update(reference), _update(config)
    batch = jnp.zeros((config.train.batch_size, config.data.context + 1), jnp.int32)
    return Overhead(ratio(plain, other, batch), more / less)


def _update(config: ConfigDict) -> tuple[Any, int]:
    """A config's update as a function of the batch alone, and its peak memory in bytes."""
    model = make_model(config, Bytes.vocab)
    state = jax.jit(lambda: init_state(model, config.train, 0))()
    batch = jax.ShapeDtypeStruct((config.train.batch_size, config.data.context + 1), jnp.int32)
    step = jax.jit(make_train_step(model, config.train, Bytes.mark, False), donate_argnums=0)
    compiled = step.lower(state, batch).compile()

    def update(batch: jax.Array) -> Any:
        nonlocal state
        state, scalars = compiled(state, batch)
        return scalars

    return update, count.peak_memory(compiled)
