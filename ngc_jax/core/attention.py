"""Attention across tokens: rotary positions, and causal attention with or without a key-value cache.

For: the only place where tokens meet. Not for: the synapses that make queries, keys and values (`nn/layers.py`).

Axes: B batch, T query tokens, S keys (S = T, or the length of the cache), H heads, d channels of a head.
"""

import jax
import jax.numpy as jnp

Array = jax.Array
Cache = dict[str, Array]  # "key", "value": [B, S, H, d]


def rotate(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864): x [B, T, H, d], d even; positions [T]."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)  # [T, d/2]
    cos = jnp.concatenate([jnp.cos(angle)] * 2, axis=-1)[:, None]
    sin = jnp.concatenate([-jnp.sin(angle), jnp.sin(angle)], axis=-1)[:, None]
    # The roll brings each channel's partner of the pair (c, c + d/2) into its place.
    return (x * cos + jnp.roll(x, half, axis=-1) * sin).astype(x.dtype)


def visible(positions: Array, keys: Array, window: int, segments: Array | None = None) -> Array:
    """Which keys each query sees: boolean [1 or B, 1, T, S].

    positions [T] of the queries and keys [S] of the keys. A query sees keys at its own position and up to
    `window` - 1 before it; with segments [B, T] (documents, numbered), only those of its own document (S = T then).
    """
    distance = positions[:, None] - keys[None, :]
    mask = ((distance >= 0) & (distance < window))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def extend(cache: Cache, key: Array, value: Array, position: Array) -> Cache:
    """Write keys and values [B, T, H, d] into the cache from `position` on."""
    at = (0, position, 0, 0)
    return {
        "key": jax.lax.dynamic_update_slice(cache["key"], key.astype(cache["key"].dtype), at),
        "value": jax.lax.dynamic_update_slice(cache["value"], value.astype(cache["value"].dtype), at),
    }


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """softmax(q k / sqrt(d)) v under the mask: [B, T, H, d] -> [B, T, H d]. Softmax in float32.

    Written out because `jax.nn.dot_product_attention` takes 4 times as long for the gradient on a CPU.
    """
    query, key, value = (a.swapaxes(1, 2) for a in (query * query.shape[-1] ** -0.5, key, value))
    score = jnp.einsum("bhtd,bhsd->bhts", query, key).astype(jnp.float32)
    share = jax.nn.softmax(jnp.where(mask, score, -jnp.inf), axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bhts,bhsd->bhtd", share, value).swapaxes(1, 2)
    return mixed.reshape(*mixed.shape[:2], -1)
