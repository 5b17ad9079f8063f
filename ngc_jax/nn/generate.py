"""Sampling from a model: prefill, then a scanned decode with a key-value cache.

For: tokens from any model, by temperature and top-p. Not for: text, or the command line
(`commands/sample.py`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.nn.model import LanguageModel

Array = jax.Array


@partial(jax.jit, static_argnames=("model", "count"))
def generate(
    model: LanguageModel,
    params: Any,
    prompt: Array,
    count: int,
    key: Array,
    temperature: Array,
    top_p: Array,
) -> Array:
    """`count` tokens [B, count] after the prompts [B, T], T >= 1.

    temperature >= 0 divides the logits, 0 takes the likeliest token; top_p in (0, 1] keeps the
    smallest set of tokens that together have at least that probability (nucleus sampling, arXiv
    1904.09751).
    """
    batch, length = prompt.shape
    dtype, params = jax.tree.leaves(params)[0].dtype, model.unstack(params)
    cache = model.init_cache(batch, length + count, dtype)
    logits, cache = model.decode(params, prompt, cache, jnp.zeros((), jnp.int32))

    def step(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
        logits, cache = carry
        token = choose(logits, jax.random.fold_in(key, i), temperature, top_p)
        after, cache = model.decode(params, token[:, None], cache, length + i)
        return (after[:, -1], cache), token

    _, tokens = jax.lax.scan(step, (logits[:, -1], cache), jnp.arange(count))
    return tokens.T


def choose(logits: Array, key: Array, temperature: Array, top_p: Array) -> Array:
    """Draw one token for each row of logits [B, V]; see `generate`."""
    scaled = logits / jnp.maximum(temperature, 1e-6)
    share = jax.nn.softmax(scaled, axis=-1)
    ranked = jnp.sort(share, axis=-1)[:, ::-1]
    before = jnp.cumsum(ranked, axis=-1) - ranked  # probability of all likelier tokens
    least = jnp.min(jnp.where(before < top_p, ranked, 1.0), axis=-1, keepdims=True)
    drawn = jax.random.categorical(key, jnp.where(share >= least, scaled, -jnp.inf))
    return jnp.where(temperature == 0, jnp.argmax(logits, axis=-1), drawn)
