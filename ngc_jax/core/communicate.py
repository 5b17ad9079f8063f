"""The communication loop: groups exchange signals for some rounds, with the same states in each.

For: one round and its scan, whatever the update is (a stack of attention and exchange stages, a synapse alone).
Not for: the update itself, or what a stage is (`nn/layers.py`).
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core.stability import Round, norm, record_round

Array = jax.Array


def communicate(
    update: Callable[[Array, Any], tuple[Array, Any]],
    start: Array,
    *,
    keep: Array,
    drive: Array,
    rounds: int,
    remat: bool = True,
    record: bool = False,
    memory: Any = None,
) -> tuple[Array, Any, Round | None]:
    """Run x <- keep x + drive e + update(x) for `rounds` rounds from x_0 = e = `start`.

    start [..., D]; keep (leak) and drive (external potential) [D], one number a channel. `memory` is a tree whose
    arrays have a leading axis of length `rounds` (key-value caches while decoding); update(x, memory of this round)
    returns what it adds to x and its new memory. With `remat` a round's insides are recomputed for the gradient, so
    that training memory grows by x alone, one [..., D] a round. With `record`, the third result holds each round's
    stability measures, else it is None. Returns (x_R, memory, records).
    """

    chex.assert_shape([keep, drive], start.shape[-1:])

    def one_round(carry: tuple[Array, Array | None], memory: Any) -> tuple[tuple[Array, Array | None], Any]:
        x, change = carry
        added, memory = update(x, memory)
        driven = drive * start
        after = keep * x + driven + added
        if change is None:
            return (after, None), (memory, None)
        measured = record_round(start, x, after, driven, added, change)
        return (after, norm(after - x)), (memory, measured)

    body = jax.checkpoint(one_round, prevent_cse=False) if remat else one_round
    change = jnp.zeros(start.shape[:-1], jnp.float32) if record else None
    (x, _), (memory, records) = jax.lax.scan(body, (start, change), memory, length=rounds)
    return x, memory, records
