"""Stability of the communication loop: what is recorded of one round, and what a run of rounds says.

For: measures along *rounds* that are cheap enough to be taken inside the loop. Not for: exponents along tokens or
depth, which need tangent vectors of their own. The published method describes its stability metric in words only;
these definitions are this project's.

x_k is the state after k rounds, x_0 = e what the loop was started from. Norms are taken per token, over channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
TINY = 1e-12  # keeps a ratio finite where a state has come fully to rest


class Round(NamedTuple):
    """One round, averaged over tokens. Stacked by the scan to arrays of shape [R]."""

    log_contraction: Array  # mean of log |x_{k+1} - x_k| / |x_k - x_{k-1}|; the first round has none and holds 0
    drive_ratio: Array  # mean of |drive e| / (|drive e| + |update|), in [0, 1]
    growth: Array  # mean of |x_{k+1}| / |x_0|


def norm(x: Array) -> Array:
    """Euclidean norm over channels in float32: [..., D] -> [...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def record_round(start: Array, before: Array, after: Array, drive: Array, update: Array, change: Array) -> Round:
    """Measure one round. All but `change` are [..., D]; `change` [...] is |x_k - x_{k-1}|, 0 in the first round."""
    ratio = jnp.log(norm(after - before) + TINY) - jnp.log(change + TINY)
    driven, updated = norm(drive), norm(update)
    return Round(
        log_contraction=jnp.mean(jnp.where(change > 0, ratio, 0.0)),
        drive_ratio=jnp.mean(driven / (driven + updated + TINY)),
        growth=jnp.mean(norm(after) / (norm(start) + TINY)),
    )


def summarise(rounds: Round) -> dict[str, Array]:
    """Scalars for the log from recorded rounds [R].

    contraction_per_round, contraction_per_round_max: geometric mean and maximum over rounds of the factor by which
    the step of the state shrinks (below 1) or grows (above 1); absent where R < 2. drive_ratio: mean share of the
    external drive in what is added each round. boundedness: max over rounds of |x_k| / |x_0|.
    """
    scalars = {"drive_ratio": jnp.mean(rounds.drive_ratio), "boundedness": jnp.max(rounds.growth)}
    if rounds.log_contraction.shape[0] > 1:
        scalars["contraction_per_round"] = jnp.exp(jnp.mean(rounds.log_contraction[1:]))
        scalars["contraction_per_round_max"] = jnp.exp(jnp.max(rounds.log_contraction[1:]))
    return scalars
