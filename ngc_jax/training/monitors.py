"""What an update remembers of those before it, to see trouble: an early warning, and loss spikes.

For: moving means and verdicts, inside the update. Not for: what is done (`step.py`, `run.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
HORIZON = 20  # updates that the mean of relative updates looks back on
THRESHOLD = 0.021  # relative update above which divergence is likely
LOSSES_HORIZON = 128  # updates that the mean loss looks back on
WARMUP = 64  # losses in the mean, before which nothing is a spike


class Updates(NamedTuple):
    """Moving geometric mean of |change of parameters| / |parameters| (results/early_warning.md)."""

    level: Array  # moving mean of log relative update
    seen: Array  # updates in it, int32


class Losses(NamedTuple):
    """Loss spikes by a moving mean, after OLMo-core's SkipStep, which sees gradient norms too."""

    mean: Array  # moving mean of the loss
    variance: Array  # moving, about that mean
    seen: Array  # updates in both, int32


def begin() -> tuple[Updates, Losses]:
    """Nothing seen yet."""
    zero, none = jnp.zeros(()), jnp.zeros((), jnp.int32)
    return Updates(zero, none), Losses(zero, zero, none)


def warn(memory: Updates, relative_update: Array) -> tuple[Updates, Array]:
    """The memory after an update, if that is finite and not 0; log(mean / threshold), > 0 warns."""
    value, share = jnp.log(relative_update), _share(memory.seen, HORIZON)
    fed = Updates(memory.level + share * (value - memory.level), memory.seen + 1)
    usable = jnp.isfinite(value)
    memory = jax.tree.map(lambda new, old: jnp.where(usable, new, old), fed, memory)
    return memory, jnp.where(memory.seen > 0, memory.level - jnp.log(THRESHOLD), -jnp.inf)


def spiked(memory: Losses, loss: Array, deviations: float) -> Array:
    """Whether the loss lies more than so many deviations above the mean, after the warm-up."""
    return (memory.seen >= WARMUP) & (loss > memory.mean + deviations * jnp.sqrt(memory.variance))


def remember(memory: Losses, loss: Array) -> Losses:
    """The memory after one more update, which must not be a spike's."""
    share, apart = _share(memory.seen, LOSSES_HORIZON), loss - memory.mean
    variance = (1 - share) * (memory.variance + share * jnp.square(apart))
    return Losses(memory.mean + share * apart, variance, memory.seen + 1)


def _share(seen: Array, horizon: int) -> Array:
    """Of the newest in the mean: plain until the horizon is filled, lest the first rule it long."""
    return 1 / jnp.minimum(seen + 1, horizon)
