"""The early warning: is this run about to diverge? One number a step, above 0 for "divergence
likely".

For: the statistic, its memory and its threshold, as pure functions that run inside the update. Not
for: what is done about it (`loop.py` says it once, and names it when a run breaks down).

The statistic is the relative update |change of the parameters| / |parameters|, both over all of
them, as a moving geometric mean. `experiments/early_warning.py` chose it among ten that a step can
know, the loop's contraction, drive and boundedness among them, and measured how early and how
surely it warns: experiments/results/early_warning.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
HORIZON = 20  # updates that the moving mean looks back on
THRESHOLD = 0.021  # relative update; see experiments/results/early_warning.md


class Memory(NamedTuple):
    """What the monitor carries from update to update."""

    level: Array  # moving mean of log relative update
    seen: Array  # updates in it, int32


def begin() -> Memory:
    """Nothing seen yet."""
    return Memory(jnp.zeros(()), jnp.zeros((), jnp.int32))


def advance(memory: Memory, relative_update: Array) -> tuple[Memory, Array]:
    """The memory after one more update, and the warning: log of the moving mean over the threshold.

    An update that was skipped, or was not finite, changes nothing.
    """
    value = jnp.log(relative_update)
    # A plain mean until the horizon is filled, so that the first updates do not rule the level for
    # long.
    share = 1 / jnp.minimum(memory.seen + 1, HORIZON)
    fed = Memory(memory.level + share * (value - memory.level), memory.seen + 1)
    usable = jnp.isfinite(value)
    memory = jax.tree.map(lambda new, old: jnp.where(usable, new, old), fed, memory)
    return memory, jnp.where(memory.seen > 0, memory.level - jnp.log(THRESHOLD), -jnp.inf)
