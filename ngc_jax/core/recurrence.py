"""Communication along tokens: a state that hears one token after another, at any length.

For: the loop over tokens, whole or in parts. Not for: what a round does (`nn/recurrent.py`), or
rounds of all tokens at once (`communicate.py`). Axes: T tokens, in front; B sequences, n neurons.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Tree = Any


def time_scales(neurons: int, groups: int, longest: float) -> np.ndarray:
    """Tokens that neurons remember for at start, [neurons]: 1 to `longest` in each group."""
    # Spread evenly in their logarithm; chrono initialisation (arXiv 1804.11188) draws them.
    return np.tile(np.geomspace(1.0, max(longest, 1.0), neurons // groups), groups)


def along_tokens(
    turn: Callable[[Array, Tree], Array],
    state: Array,
    said: Tree,
    first: Array | None = None,
    *,
    rounds: int = 1,
    remat: bool = True,
) -> tuple[Array, Array]:
    """Runs h <- turn(h, what the token says), `rounds` times a token, from `state` [B, n].

    said: a tree of arrays [T, B, ...]. first [T, B], bool, if given: where a document begins, which
    finds h = 0. With `remat` a token is recomputed for the gradient. Returns the last h, and h
    after each token [T, B, n].
    """

    def token(h: Array, heard: tuple[Tree, Array | None]) -> tuple[Array, Array]:
        said, first = heard
        if first is not None:
            h = jnp.where(first[:, None], 0, h)
        h, _ = jax.lax.scan(lambda h, _: (turn(h, said), None), h, length=rounds)
        return h, h

    body = jax.checkpoint(token, prevent_cse=False) if remat else token
    return jax.lax.scan(body, state, (said, first))


def in_chunks(
    run: Callable[[Tree, Tree], tuple[Tree, Tree]], state: Tree, inputs: Tree, length: int
) -> tuple[Tree, Tree]:
    """run(state, inputs) -> (state, outputs), for `length` tokens at a time; 0: for all at once.

    The leading axis of inputs and outputs is T. The state goes from chunk to chunk and gradients do
    not (Williams and Peng 1990, Neural Computation 2); each chunk is recomputed for its own.
    """
    tokens = jax.tree.leaves(inputs)[0].shape[0]
    if not 0 < length < tokens:
        return run(state, inputs)
    begin = jax.lax.stop_gradient
    chunk = jax.checkpoint(lambda state, said: run(begin(state), said), prevent_cse=False)
    whole = tokens - tokens % length
    parts = jax.tree.map(lambda a: a[:whole].reshape(-1, length, *a.shape[1:]), inputs)
    state, outputs = jax.lax.scan(chunk, state, parts)
    outputs = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), outputs)
    if whole == tokens:
        return state, outputs
    state, rest = chunk(state, jax.tree.map(lambda a: a[whole:], inputs))
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, rest)
