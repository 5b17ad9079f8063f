"""The communication loop: groups exchange signals for some rounds, with the same states in each.

For: loops of a number of rounds that is fixed, an array, or that the state decides. Not for: what a
round adds (`nn/layers.py`), or how many rounds training takes (`training/rounds.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.dynamics.measures import Round, norm, record_round, relative_change

Array = jax.Array
Turn = Callable[[Array], Array]  # one round, x -> phi(keep x + drive e + update(x))
# phi. A state near an end of tanh's range is carried as a bit is: what is added to it is lost.
STATE_ACTIVATIONS: dict[str | None, Turn] = {None: lambda x: x, "tanh": jnp.tanh}


def advance(x: Array, added: Array, driven: Array, keep: Array, activation: str | None) -> Array:
    """The state after a round, phi(keep x + drive e + update(x))."""
    return STATE_ACTIVATIONS[activation](keep * x + driven + added)


def communicate(
    update: Callable[[Array, Any], tuple[Array, Any]],
    start: Array,
    keep: Array,
    drive: Array,
    *,
    rounds: int,
    activation: str | None = None,
    remat: bool = True,
    record: bool = False,
    memory: Any = None,
) -> tuple[Array, Any, Round | None]:
    """Run x <- phi(keep x + drive e + update(x)) for `rounds` rounds from x_0 = e = `start`.

    start [..., D]; keep (leak) and drive (external potential) [D]; phi is the entry `activation` of
    STATE_ACTIVATIONS, else KeyError. `memory`: a tree of arrays with a leading axis of `rounds`
    (caches); update(x, memory of this round) returns what it adds to x and its new memory. With
    `remat` a round is recomputed for the gradient. Returns (x_R, memory, each round's stability
    measures if `record`, else None).
    """
    import chex  # not before: --help waits for this file

    chex.assert_shape([keep, drive], start.shape[-1:])

    def one_round(carry: tuple[Array, Any], memory: Any) -> tuple[tuple[Array, Any], Any]:
        x, change = carry
        (added, memory), driven = update(x, memory), drive * start
        after = advance(x, added, driven, keep, activation)
        if change is None:
            return (after, None), (memory, None)
        measured = record_round(start, x, after, driven, added, change)
        return (after, norm(after - x)), (memory, measured)

    body = jax.checkpoint(one_round, prevent_cse=False) if remat else one_round
    change = jnp.zeros(start.shape[:-1], jnp.float32) if record else None
    (x, _), (memory, records) = jax.lax.scan(body, (start, change), memory, length=rounds)
    return x, memory, records


def communicate_per_example(
    turn: Turn,
    start: Array,
    rounds: Array,
    *,
    backprop: int,
    still: Turn | None,
    every: int = 0,
    remat: bool = True,
    disturb: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Run x <- turn(x) from x_0 = `start`, for each example as many rounds as it asks for.

    start [B, ...]; rounds [B], int32, >= 0. Gradients go through the last `backprop` rounds of each
    example. The rounds before are run by `still`, turn with gradients stopped, in a loop that keeps
    nothing; with still=None there are none, and `backprop` is the most rounds that are run. An
    example of fewer rounds rests before its first one, so that all end together. disturb(x, rounds
    left with this one), if given, is what becomes of a state after its round.
    Returns states [S, B, ...] and the rounds [S, B] that each example had made there: after the
    last round and, where `every` > 0, each `every` rounds before it within the last `backprop`.
    """
    asked = rounds.reshape(-1, *(1,) * (start.ndim - 1))

    def after_round(by: Turn, x: Array, left: Array) -> Array:
        return jnp.where(left <= asked, disturb(by(x), left) if disturb else by(x), x)

    x = start
    if still is not None:
        longest, begin = jnp.max(rounds), jax.lax.stop_gradient(start)
        before = jnp.maximum(longest - backprop, 0)
        x = jax.lax.fori_loop(0, before, lambda i, x: after_round(still, x, longest - i), begin)
        x = jnp.where(asked <= backprop, start, x)  # whose gradient goes back to where they began

    def one_round(x: Array, left: Array) -> tuple[Array, Array | None]:
        after = after_round(turn, x, left)
        return after, after if every else None

    body = jax.checkpoint(one_round, prevent_cse=False) if remat else one_round
    x, states = jax.lax.scan(body, x, jnp.arange(backprop, 0, -1))
    if not every or not backprop:
        return x[None], rounds[None]
    kept = slice((backprop - 1) % every, None, every)
    left = np.arange(backprop - 1, -1, -1)[kept]  # after each state that is returned
    return states[kept], rounds - left[:, None]


def communicate_until_settled(
    turn: Turn, start: Array, tolerance: Array | float, cap: int
) -> tuple[Array, Array]:
    """Runs x <- turn(x) from `start` [..., D] until no state moves, `cap` rounds at most.

    A token's state rests in a round that would move it by less than `tolerance` of its length.
    Returns the state, and the rounds [...] in which each token moved. No gradient.
    """

    def one_round(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        x, rounds, made, _ = carry
        after = turn(x)
        moves = ~(relative_change(after, x) < tolerance)  # what is not finite does not rest
        return jnp.where(moves[..., None], after, x), rounds + moves, made + 1, jnp.any(moves)

    zeros = [jnp.zeros(shape, jnp.int32) for shape in (start.shape[:-1], ())]
    begin: tuple[Array, ...] = (start, *zeros, jnp.ones((), bool))
    x, rounds, *_ = jax.lax.while_loop(lambda carry: carry[3] & (carry[2] < cap), one_round, begin)
    return x, rounds
