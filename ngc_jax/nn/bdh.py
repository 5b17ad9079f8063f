"""BDH, the Dragon Hatchling (arXiv 2509.26507), in its published GPU form: a baseline.

For: the published function exactly, with the same functions as `Decoder`. Not for: what only ours
has (groups, synapse rules, rounds), nor the published dropout of 0.1 on the neurons, for nothing
here drops anything.

Tokens x [T, D] excite neurons, of which few are active; neurons of earlier tokens that are active
together with a token's own pass their x on to it; what was heard gates the neurons, and these speak
back. With n(z) = (z - mean z) / sqrt(var z + 1e-5) over channels, without learned scale, and R_t
the rotation by position t (base 2^16):

    x = n(E[token])
    L times, with the same weights:
        s = relu(x W_e)                                   [T, N] in each head
        a_t = n(sum over u < t of (R_t s_t . R_u s_u) x_u)
        x = n(x + n((s * relu(a W_v)) W_d))               over the neurons of all heads
    logits = x U

Axes: B batch, T tokens, D width, H heads, N neurons of a head, L layers, V vocabulary.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core import attention
from ngc_jax.core.params import ParamInfo
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import end_info
from ngc_jax.nn.layers import unembed
from ngc_jax.nn.mesh import constrain

Array = jax.Array
Params = dict[str, Any]

ROTARY_BASE = 2.0**16
STD = 0.02  # of every parameter at the start


@dataclasses.dataclass(frozen=True)
class BDHShape:
    """Sizes, with the published values. The fields that `ModelShape` has too mean the same."""

    vocab: int = 256
    width: int = 256
    # neurons of all heads, H N: the published mlp_internal_dim_multiplier is hidden / width
    hidden: int = 128 * 256
    heads: int = 4
    layers: int = 6  # times that the one layer runs
    remat: bool = False  # recompute each layer for the gradient

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            even = f"an even number of neurons for each of {self.heads} heads"
            raise ValueError(f"hidden={self.hidden}: must be {even}")


@dataclasses.dataclass(frozen=True)
class BDH:
    """Functions of one shape; holds no arrays."""

    shape: BDHShape

    def init(self, key: Array) -> Params:
        """Parameters, float32, all normal with the published standard deviation."""
        s = self.shape
        embed, encoder, encoder_v, decoder, unembed = jax.random.split(key, 5)
        inward = (s.heads, s.width, s.hidden // s.heads)
        return {
            "embed": STD * jax.random.normal(embed, (s.vocab, s.width)),
            "encoder": {"weight": STD * jax.random.normal(encoder, inward)},
            "encoder_v": {"weight": STD * jax.random.normal(encoder_v, inward)},
            "decoder": {"weight": STD * jax.random.normal(decoder, (s.hidden, s.width))},
            "unembed": STD * jax.random.normal(unembed, (s.width, s.vocab)),
        }

    def param_info(self) -> Params:
        """The record of each parameter, as a tree parallel to them: heads may be split."""
        inward = {"weight": ParamInfo("matrix", ("channel", None, None), matrix=-2)}
        outward = {"weight": ParamInfo("matrix", ("channel", None), matrix=-2)}
        return {"encoder": inward, "encoder_v": inward, "decoder": outward, **end_info()}

    def embed(self, params: Params, batch: Batch) -> Array:
        """The stream [B, T, D] of a batch's tokens, batch.inputs [B, T]."""
        chex.assert_rank(batch.inputs, 2)
        table = constrain(params["embed"], None, "group")
        return constrain(table[batch.inputs], "window", None, None)

    def apply(self, params: Params, batch: Batch, record: bool = False) -> tuple[Array, None]:
        """Logits [B, T, V] in float32, and None, since there are no rounds to `record`.

        Computes in the dtype of `params`. A token hears those of its own segment before it.
        """
        x, segments = self.embed(params, batch), batch.segments
        if segments is not None:
            chex.assert_shape(segments, x.shape[:2])
        logits, _ = self._forward(params, x, jnp.arange(x.shape[1]), segments, None)
        return logits, None

    def decode(
        self, params: Params, tokens: Array, cache: Array, position: Array
    ) -> tuple[Array, Array]:
        """Logits [B, T, V] for tokens at `position` and after, with what came before in `cache`."""
        x = self.embed(params, Batch(tokens))
        return self._forward(params, x, position + jnp.arange(tokens.shape[1]), None, cache)

    def unstack(self, params: Params) -> Params:
        """Parameters as they are: there is one layer."""
        return params

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Array:
        """Attention's state before the first token: [L, B, H, N, D], for any `length`."""
        s = self.shape
        return jnp.zeros((s.layers, batch, s.heads, s.hidden // s.heads, s.width), dtype)

    def generated(self) -> dict[str, dict[str, int]]:
        """None: all weights are stored."""
        return {}

    def _forward(
        self, params: Params, x: Array, positions: Array, segments: Array | None, cache: Any
    ) -> tuple[Array, Any]:
        s = self.shape
        # A token does not hear itself: it sees what the token before it would.
        mask = attention.attention_mask(positions - 1, positions, x.shape[1], segments)
        encoder, encoder_v = (
            constrain(params[name]["weight"], "group", None, None)
            for name in ("encoder", "encoder_v")
        )
        decoder = constrain(params["decoder"]["weight"], "group", None).reshape(
            s.heads, -1, s.width
        )

        def layer(x: Array, state: Array | None) -> tuple[Array, Array | None]:
            active = constrain(
                jax.nn.relu(jnp.einsum("btd,hdn->bhtn", x, encoder)), "window", "group", None, None
            )
            read = attention.rotate_neighbours(active, positions, ROTARY_BASE)
            mixed, state = attention.attend_linearly(read, x, mask, state)
            gated = active * jax.nn.relu(jnp.einsum("bhtd,hdn->bhtn", normalise(mixed), encoder_v))
            said = constrain(jnp.einsum("bhtn,hnd->btd", gated, decoder), "window", None, None)
            return normalise(x + normalise(said)), state

        if s.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        x, cache = jax.lax.scan(layer, normalise(x), cache, length=s.layers)
        return unembed(constrain(x, "window", None, None), params["unembed"]), cache


def normalise(x: Array) -> Array:
    """LayerNorm (arXiv 1607.06450) over the last axis, nothing learned, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-5)).astype(
        x.dtype
    )
