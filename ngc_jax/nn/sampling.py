"""Tokens drawn one after another: which may be drawn, and what is kept between them.

For: any `LanguageModel`. Not for: text, or when it ends (`training/writer.py`). Axes: B texts, T
tokens, V vocabulary.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngc_jax.nn.model import LanguageModel, Params

Array = jax.Array


class Sampling(NamedTuple):
    """How a token is drawn from its logits, in the order of what is applied.

    repetition_penalty > 0 makes tokens that were there less likely (arXiv 1909.05858), 1: does not.
    temperature >= 0 divides the logits, 0: the likeliest token. Of the rest `top_k` likeliest stay,
    0: all; then the fewest that together have the probability `top_p` (arXiv 1904.09751); then
    those that are at least `min_p` times as likely as the likeliest (arXiv 2407.01082).
    """

    temperature: Any = 0.8
    top_p: Any = 0.95
    top_k: Any = 0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0


class Heard(NamedTuple):
    """A model after some tokens: all that the next one depends on."""

    logits: Array  # [B, V] of the next token
    cache: Any
    position: Array  # int32: how many tokens there were
    seen: Array  # [B, V] bool: which


def begin(model: LanguageModel, batch: int, length: int, dtype: Any) -> Heard:
    """Before the first of `length` tokens at most."""
    none = jnp.zeros((batch, model.shape.vocab))
    cache = model.init_cache(batch, length, dtype)
    return Heard(none, cache, jnp.zeros((), jnp.int32), none > 0)


def read(model: LanguageModel, params: Params, heard: Heard, tokens: Array) -> Heard:
    """After tokens [B, T] more; `params` as `unstack` lays them."""
    logits, cache = model.decode(params, tokens, heard.cache, heard.position, last=True)
    seen = heard.seen.at[jnp.arange(len(tokens))[:, None], tokens].set(True)
    return Heard(logits[:, -1], cache, heard.position + tokens.shape[1], seen)


def write(
    model: LanguageModel, params: Params, heard: Heard, key: Array, i: Array, sampling: Sampling
) -> tuple[Array, Heard]:
    """The next token [B], drawn as the i-th of a key, and what there is after it."""
    token = choose(heard.logits, jax.random.fold_in(key, i), sampling, heard.seen)
    return token, read(model, params, heard, token[:, None])


@partial(jax.jit, static_argnames=("model", "count"))
def generate(
    model: LanguageModel, params: Params, prompt: Array, count: int, key: Array, sampling: Sampling
) -> Array:
    """`count` tokens [B, count] after the prompts [B, T], T >= 1: token i by fold_in(key, i)."""
    batch, length = prompt.shape
    dtype, params = jax.tree.leaves(params)[0].dtype, model.unstack(params)
    heard = read(model, params, begin(model, batch, length + count, dtype), prompt)

    def step(heard: Heard, i: Array) -> tuple[Heard, Array]:
        token, heard = write(model, params, heard, key, i, sampling)
        return heard, token

    return jax.lax.scan(step, heard, jnp.arange(count))[1].T


def choose(logits: Array, key: Array, sampling: Sampling, seen: Array | None = None) -> Array:
    """Draws one token for each row of logits [B, V], `seen` [B, V] saying which were there."""
    if seen is not None:
        less = jnp.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = jnp.where(seen, less, logits)
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
    ranked = jnp.sort(scaled, axis=-1)[:, ::-1]
    among = (sampling.top_k == 0) | (jnp.arange(logits.shape[-1]) < sampling.top_k)
    share = jax.nn.softmax(jnp.where(among, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(share, axis=-1) - share  # probability of all likelier tokens
    kept = among & (before < sampling.top_p) & (share >= sampling.min_p * share[:, :1])
    least = jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(scaled >= least, scaled, -jnp.inf))
    return jnp.where(sampling.temperature == 0, jnp.argmax(logits, axis=-1), drawn)
