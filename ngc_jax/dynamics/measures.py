"""Measures of stability that are read from states as they pass: of rounds, of tokens, of signals.

For: numbers of a round, and of sequences of states. Not for: exponents (`lyapunov.py`). The method
has its stability metric in words only; these definitions are ours. x_k is the state after k rounds,
x_0 = e the loop's start. Norms are per token, over channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
TINY = 1e-12  # keeps a ratio finite where a state has come fully to rest
STILL = 1e-6  # a distance, in lengths of a state, that is none but for rounding


class Round(NamedTuple):
    """One round, averaged over tokens. Stacked by the scan to arrays of shape [R]."""

    log_contraction: Array  # mean of log |x_{k+1} - x_k| / |x_k - x_{k-1}|; 0 in the first round
    drive_ratio: Array  # mean of |drive e| / (|drive e| + |update|), in [0, 1]
    growth: Array  # mean of |x_{k+1}| / |x_0|


def norm(x: Array) -> Array:
    """Euclidean norm over channels in float32: [..., D] -> [...]."""
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))


def record_round(
    start: Array, before: Array, after: Array, drive: Array, update: Array, change: Array
) -> Round:
    """Measures one round on [..., D]; `change` [...] is |x_k - x_{k-1}|, at first 0."""
    ratio = jnp.log(norm(after - before) + TINY) - jnp.log(change + TINY)
    contracted = jnp.mean(jnp.where(change > 0, ratio, 0.0))
    share = jnp.mean(drive_ratio(drive, update))
    return Round(contracted, share, growth=jnp.mean(norm(after) / (norm(start) + TINY)))


def summarise(rounds: Round) -> dict[str, Array]:
    """Scalars for the log from recorded rounds [R].

    contraction_per_round, contraction_per_round_max: geometric mean and maximum of `contraction`;
    absent where R < 2. drive_ratio: its mean. boundedness: max of |x_k| / |x_0|.
    """
    scalars = {"drive_ratio": jnp.mean(rounds.drive_ratio), "boundedness": jnp.max(rounds.growth)}
    if rounds.log_contraction.shape[0] > 1:
        scalars["contraction_per_round"] = jnp.exp(jnp.mean(rounds.log_contraction[1:]))
        scalars["contraction_per_round_max"] = jnp.exp(jnp.max(rounds.log_contraction[1:]))
    return scalars


def contraction(states: Array) -> Array:
    """|x_{k+1} - x_k| / |x_k - x_{k-1}|: states [K + 1, ..., D] -> [K - 1, ...], or ValueError."""
    if states.shape[0] < 3:
        raise ValueError(f"states: {states.shape[0]} of them; a ratio of two steps needs 3 or more")
    step = norm(jnp.diff(states.astype(jnp.float32), axis=0))
    return step[1:] / jnp.maximum(step[:-1], TINY)


def boundedness(states: Array) -> Array:
    """max over k of |x_k| / |x_0| for states [K + 1, ..., D]: [...], at least 1."""
    size = norm(states)
    return jnp.max(size, axis=0) / jnp.maximum(size[0], TINY)


def drive_ratio(drive: Array, update: Array) -> Array:
    """|drive| / (|drive| + |update|) of [..., D]: [...], in [0, 1]: the share from outside."""
    driven, updated = norm(drive), norm(update)
    return driven / jnp.maximum(driven + updated, TINY)


def token_moves(states: Array) -> Array:
    """log of |x_t - x_{t-1}| / mean norm, nan where it is rounding: [..., T, D] -> [..., T - 1]."""
    scale = jnp.mean(norm(states), axis=-1, keepdims=True)
    moved = norm(jnp.diff(states.astype(jnp.float32), axis=-2)) / jnp.maximum(scale, TINY)
    return jnp.where(moved > STILL, jnp.log(moved + TINY), jnp.nan)


def token_contraction(states: Array) -> Array:
    """Slope of `token_moves`, < 0 if a text settles: [..., T, D] -> [...]; ValueError if T < 3."""
    if states.shape[-2] < 3:
        raise ValueError(f"states: {states.shape[-2]} tokens; a slope needs 3 or more")
    moves = token_moves(states)
    return slope(jnp.nan_to_num(moves), jnp.isfinite(moves))


def slope(values: Array, where: Array | None = None) -> Array:
    """Least-squares slope of values [..., T] over their index, of those in `where` alone: [...]."""
    weight = jnp.ones_like(values) if where is None else where.astype(values.dtype)
    count = jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1)
    at = jnp.arange(values.shape[-1], dtype=values.dtype)
    at = (at - jnp.sum(weight * at, axis=-1, keepdims=True) / count) * weight
    return jnp.sum(values * at, axis=-1) / jnp.maximum(jnp.sum(jnp.square(at), axis=-1), TINY)


def relative_change(after: Array, before: Array) -> Array:
    """|x_{k+1} - x_k| / |x_k| of [..., D]: [...]."""
    moved = norm(after.astype(jnp.float32) - before.astype(jnp.float32))
    return moved / jnp.maximum(norm(before), TINY)


departure = relative_change  # |x - x~| / |x~|, x~ the state without messages, or without drive
