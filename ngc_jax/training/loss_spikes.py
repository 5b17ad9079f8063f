"""Loss spikes: is the loss of this batch far above what it was of late? Then its update is better
not made.

For: the running mean and deviation, and the verdict, as pure functions that run inside the update.
Not for: what is done about it (`step.py` skips the update, `loop.py` goes back after many).

After the SkipStep optimizers of OLMo-core, which look at the last 128 updates, from the 64th on,
and skip what lies more than 6 deviations above; ours is a moving mean, which two numbers carry, and
what was skipped does not move it. Theirs look at the gradient's norm too: ours does not, for
`train.clip_norm` bounds what one gradient can do.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
HORIZON = 128  # updates that the moving mean looks back on
WARMUP = 64  # updates in it, before which nothing is a spike


class Memory(NamedTuple):
    """What is carried from update to update."""

    mean: Array  # moving mean of the loss
    variance: Array  # moving, about that mean
    seen: Array  # updates in both, int32


def begin() -> Memory:
    """Nothing seen yet."""
    return Memory(jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32))


def spiked(memory: Memory, loss: Array, deviations: float) -> Array:
    """Whether the loss lies more than so many deviations above the mean; never before the warm-up
    is over.
    """
    return (memory.seen >= WARMUP) & (loss > memory.mean + deviations * jnp.sqrt(memory.variance))


def advance(memory: Memory, loss: Array) -> Memory:
    """The memory after one more update, which must not be a spike's."""
    # A plain mean until the horizon is filled, so that the first updates do not rule it for long.
    share = 1 / jnp.minimum(memory.seen + 1, HORIZON)
    apart = loss - memory.mean
    variance = (1 - share) * (memory.variance + share * jnp.square(apart))
    return Memory(memory.mean + share * apart, variance, memory.seen + 1)
