"""Attention across tokens: rotary positions; with or without a cache; without softmax.

For: the only place where tokens meet. Not for: what makes queries, keys and values (`nn/`). Axes: B
batch, T query tokens, S keys (T, or the cache's length), H heads, d channels of a head; in linear
attention N neurons of a head, D channels of a value.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Cache = dict[str, Array]  # "key", "value": [B, S, H, d]


def rotate(x: Array, positions: Array, base: float = 10_000.0, scaling: str = "") -> Array:
    """Rotary positions (RoFormer, arXiv 2104.09864) on x [B, T, H, d], d even; positions [T]."""
    half, frequency = x.shape[-1] // 2, frequencies(x.shape[-1], base, scaling)
    angle = positions[:, None] * frequency  # [T, d/2]
    cos = jnp.concatenate([jnp.cos(angle)] * 2, axis=-1)[:, None]
    sin = jnp.concatenate([-jnp.sin(angle), jnp.sin(angle)], axis=-1)[:, None]
    # The roll brings each channel's partner of the pair (c, c + d/2) into its place.
    return (x * cos + jnp.roll(x, half, axis=-1) * sin).astype(x.dtype)


def frequencies(size: int, base: float, scaling: str = "") -> Array:
    """Radians a token by which `rotate` turns the pairs of `size` channels: [size / 2].

    scaling: "linear:F" divides all of them by F; "llama3:F,LOW,HIGH,TOKENS", as Llama 3.1, only
    those of less than LOW turns in so many tokens, and in part those of less than HIGH.
    """
    half = size // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if not scaling:
        return frequency
    slow: Array | float = 1.0
    factor, *limits = map(float, scaling.partition(":")[2].split(","))
    if limits:
        low, high, original = limits
        turns = original * frequency / (2 * jnp.pi)
        slow = jnp.clip((high - turns) / (high - low), 0, 1)
    return frequency * (1 - slow + slow / factor)


def attention_mask(
    positions: Array, keys: Array, window: int, segments: Array | None = None, causal: bool = True
) -> Array:
    """Which keys each query sees: boolean [1 or B, 1, T, S].

    A query at positions [T] sees the keys [S] at its own and up to `window` - 1 positions before,
    unless `causal` as many after; with segments [B, T] (documents; S = T), those of its own only.
    """
    distance = positions[:, None] - keys[None, :]
    mask = (((distance >= 0) | (not causal)) & (abs(distance) < window))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def update_cache(cache: Cache, key: Array, value: Array, position: Array) -> Cache:
    """Write keys and values [B, T, H, d] into the cache from `position` on."""
    write, new = jax.lax.dynamic_update_slice, {"key": key, "value": value}
    at = (0, position, 0, 0)
    return {name: write(old, new[name].astype(old.dtype), at) for name, old in cache.items()}


def attention_weights(query: Array, key: Array, mask: Array) -> Array:
    """softmax(q k / sqrt(d)) under the mask: q, k [B, T, H, d] -> [B, H, T, S] float32.

    Of fewer keys' heads, each is asked by as many neighbouring queries' (arXiv 2305.13245).
    """
    # `jax.nn.dot_product_attention` takes 4 times as long for the gradient on a CPU.
    query, key = (a.swapaxes(1, 2) for a in (query * query.shape[-1] ** -0.5, key))
    if key.shape[1] < query.shape[1]:
        grouped = query.reshape(len(query), key.shape[1], -1, *query.shape[2:])
        score = jnp.einsum("bkrtd,bksd->bkrts", grouped, key)
        score = score.reshape(*query.shape[:3], -1).astype(jnp.float32)
    else:
        score = jnp.einsum("bhtd,bhsd->bhts", query, key).astype(jnp.float32)
    return jax.nn.softmax(jnp.where(mask, score, -jnp.inf), axis=-1)


def mix(share: Array, value: Array) -> Array:
    """Values [B, S, H, d] in the shares [B, H, T, S] in which they are heeded: [B, T, H d].

    Of fewer values' heads, each is heeded by as many neighbouring ones, as in `attention_weights`.
    """
    share, value = share.astype(value.dtype), value.swapaxes(1, 2)
    if value.shape[1] < share.shape[1]:
        grouped = share.reshape(len(share), value.shape[1], -1, *share.shape[2:])
        mixed = jnp.einsum("bkrts,bksd->bkrtd", grouped, value)
        mixed = mixed.reshape(*share.shape[:3], -1)
    else:
        mixed = jnp.einsum("bhts,bhsd->bhtd", share, value)
    return mixed.swapaxes(1, 2).reshape(len(mixed), mixed.shape[2], -1)


def fused(query: Array) -> bool:
    """Whether cuDNN has attention in one kernel (arXiv 2205.14135) for queries [B, T, H, d] here.

    In half precision, from Ampere on, for d up to 128 in eights; without forward-mode derivatives.
    """
    if jax.default_backend() != "gpu" or query.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    device: Any = jax.local_devices()[0]
    able: str = device.compute_capability  # AMD's are "gfx..."
    return able[:1].isdecimal() and float(able) >= 8 and query.shape[-1] in range(8, 129, 8)


def attend_fused(query: Array, key: Array, value: Array, causal: bool = True) -> Array:
    """Attention to all tokens, or if `causal` all before: [B, T, H, d] each -> [B, T, H d]."""
    # It lowers for CUDA; no GPU has run it yet.
    how: Any = {"is_causal": causal, "implementation": "cudnn"}
    mixed = jax.nn.dot_product_attention(query, key, value, **how)
    return mixed.reshape(*mixed.shape[:2], -1)


def rotate_neighbours(x: Array, positions: Array, base: float) -> Array:
    """Rotary positions on the pairs of channels (2c, 2c + 1): x [..., T, N], N even; positions [T].

    As BDH does it: whole turns are dropped from angles, which float32 shows at distant positions.
    """
    frequency = base ** (-jnp.arange(0, x.shape[-1], 2, dtype=jnp.float32) / x.shape[-1])
    angle = 2 * jnp.pi * ((positions[:, None] * (frequency / (2 * jnp.pi))) % 1)  # [T, N/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., ::2], x[..., 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend_linearly(
    read: Array, value: Array, mask: Array, state: Array | None = None
) -> tuple[Array, Array | None]:
    """sum over s of (read_t . read_s) value_s under the mask, without softmax: [B, H, T, D].

    read [B, H, T, N], query and key in one; value [B, T, D], of all heads. `state` [B, H, N, D], if
    given, is the sum of read_s value_s over tokens before; it is returned with these added.
    """
    score = jnp.where(mask, jnp.einsum("bhtn,bhsn->bhts", read, read), 0)
    mixed = jnp.einsum("bhts,bsd->bhtd", score, value)
    if state is not None:
        mixed = mixed + jnp.einsum("bhtn,bhnd->bhtd", read, state.astype(read.dtype))
        state = state + jnp.einsum("bhtn,btd->bhnd", read, value).astype(state.dtype)
    return mixed, state
