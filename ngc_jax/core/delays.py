"""Conduction delays: what a token says is heard some tokens later.

For: reading `config.model.delays`, and the one function that makes signals late. Not for: which
signals are late (`nn/synapse.py`). Axes: B batch, T tokens, p numbers of a signal, K delays, from 0
to K - 1 tokens.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Delays(NamedTuple):
    """By how many tokens the numbers of a signal are late."""

    tokens: tuple[int, ...]  # of number q: tokens[q % len(tokens)]; (): none is late
    learned: bool = False  # whether they are only where a learned kernel starts

    def kernel(self, numbers: int) -> np.ndarray:
        """The share of each delay in each number of a signal: [K, numbers], 0 or 1."""
        late = np.resize(self.tokens, numbers)
        return np.equal(np.arange(max(self.tokens) + 1)[:, None], late).astype(np.float32)


def parse(text: str) -> Delays:
    """Reads "" (no delays), "0,1" (fixed ones) or "taps:4" (a learned kernel of so many tokens).

    Raises ValueError for another text, with one that works.
    """
    if not text:
        return Delays(())
    if found := re.fullmatch(r"taps:([2-9]|[1-9]\d{1,3})", text):
        return Delays(tuple(range(int(found[1]))), learned=True)
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        wants = "must be '', tokens such as '0,1', or 'taps:4', a learned kernel"
        raise ValueError(f"delays={text!r}: {wants}")
    tokens = tuple(map(int, text.split(",")))
    return Delays(tokens if any(tokens) else ())


def late(
    signal: Array, kernel: Any, segments: Array | None = None, past: Array | None = None
) -> tuple[Array, Array]:
    """What is heard of a signal, sum over d of kernel[d] * signal at token t - d: [B, T, ..., p].

    kernel [K, p]: an array that is learned, or constants in NumPy, of which rows of 0 cost nothing.
    `past` [B, K - 1, ..., p], oldest first: the signal before the first token; None: 0. With
    segments [B, T], which number documents, what another document says is 0. Returns with it the
    signal of the last K - 1 tokens.
    """
    longest, count = len(kernel) - 1, signal.shape[1]
    if past is None:
        past = jnp.zeros((len(signal), longest, *signal.shape[2:]), signal.dtype)
    said = jnp.concatenate([past.astype(signal.dtype), signal], axis=1)
    heard = jnp.zeros_like(signal)
    for delay, share in enumerate(kernel):
        if isinstance(share, np.ndarray) and not share.any():
            continue
        then = said[:, longest - delay : longest - delay + count]
        if segments is not None and delay:
            before = jnp.pad(segments, ((0, 0), (delay, 0)), constant_values=-1)[:, :count]
            same = (segments == before).reshape(*segments.shape, *(1,) * (signal.ndim - 2))
            then = jnp.where(same, then, 0)
        heard = heard + jnp.asarray(share, signal.dtype) * then
    return heard, said[:, count:].astype(past.dtype)
