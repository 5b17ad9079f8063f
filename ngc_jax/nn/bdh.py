"""BDH, the Dragon Hatchling (arXiv 2509.26507), in its published GPU form: a baseline.

For: the published function exactly. Not for: what only ours has (groups, rules, rounds), nor the
published dropout of 0.1 on neurons. With n(z) = (z - mean z) / sqrt(var z + 1e-5) over channels and
R_t the rotation by position t (base 2^16):

    x = n(E[token])
    L times, with the same weights:
        s = relu(x W_e)                                   [T, N] in each head
        a_t = n(sum over u < t of (R_t s_t . R_u s_u) x_u)
        x = n(x + n((s * relu(a W_v)) W_d))               over the neurons of all heads
    logits = x U
With `delays` (`core/delays.py`), of which the published model has none, what W_e, W_v and W_d read
is late, channel by channel, as in a dense decoder.
Axes: B batch, T tokens, D width, H heads, N neurons of a head, L layers, V vocabulary.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ngc_jax.core import attention
from ngc_jax.core.delays import late, parse
from ngc_jax.core.params import ParamInfo
from ngc_jax.nn.layers import rms_normalize
from ngc_jax.nn.mesh import constrain
from ngc_jax.nn.model import LanguageModel, Maybe, Pair, Params, end_info, unembed

Array = jax.Array
ROTARY_BASE = 2.0**16
STD = 0.02  # of every parameter at the start


@dataclasses.dataclass(frozen=True)
class BDHShape:
    """Sizes, with the published values. The fields that `ModelShape` has too mean the same."""

    vocab: int = 256
    width: int = 256
    hidden: int = 128 * 256  # neurons, H N: published as width times mlp_internal_dim_multiplier
    heads: int = 4
    layers: int = 6  # times that the one layer runs
    remat: bool = False  # recompute each layer for the gradient
    delays: str = ""  # in tokens, of channels 0, 1, ... that a matrix reads, in turn: "0,1"
    stream_axes: ClassVar[tuple[str | None, ...]] = ("window", None, None)

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            wants = f"must be an even number of neurons for each of {self.heads} heads"
            raise ValueError(f"hidden={self.hidden}: {wants}")
        if parse(self.delays).learned:
            raise ValueError(f"delays={self.delays!r}: must be fixed, such as '0,1'")


@dataclasses.dataclass(frozen=True)
class BDH(LanguageModel):
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
        inward = {"weight": ParamInfo("matrix", ("channel", None, None), matrix=-2)}  # of heads
        outward = {"weight": ParamInfo("matrix", ("channel", None), matrix=-2)}
        return {"encoder": inward, "encoder_v": inward, "decoder": outward, **end_info()}

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> tuple[Any, Params]:
        """Attention's state before the first token, [L, B, H, N, D], for any `length`.

        With it, under `delays`, what each matrix read at the last tokens: [L, B, tokens, ...].
        """
        s = self.shape
        zeros, read = partial(jnp.zeros, dtype=dtype), (s.heads, s.hidden // s.heads)
        sizes = {"encoder": (s.width,), "encoder_v": (s.heads, s.width), "decoder": read}
        tokens = max(parse(s.delays).tokens, default=0)
        past = {n: zeros((s.layers, batch, tokens, *size)) for n, size in sizes.items() if tokens}
        return zeros((s.layers, batch, *read, s.width)), past

    def forward(
        self, params: Params, x: Array, at: Array, segments: Maybe, cache: Any, last: bool = False
    ) -> Pair:
        s = self.shape
        # A token does not hear itself: it sees what the token before it would.
        mask = attention.attention_mask(at - 1, at, x.shape[1], segments)
        encoder = constrain(params["encoder"]["weight"], "group", None, None)
        encoder_v = constrain(params["encoder_v"]["weight"], "group", None, None)
        decoder = constrain(params["decoder"]["weight"], "group", None)
        decoder = decoder.reshape(s.heads, -1, s.width)

        delays = parse(s.delays)

        def layer(x: Array, kept: tuple[Array, Params] | None) -> tuple[Array, Any]:
            (state, past), after = kept or (None, {}), {}

            def hear(name: str, said: Array, axis: int = 1) -> Array:
                if not delays.tokens:
                    return said
                kernel, by_token = delays.kernel(said.shape[-1]), jnp.moveaxis(said, axis, 1)
                heard, after[name] = late(by_token, kernel, segments, past.get(name))
                return jnp.moveaxis(heard, 1, axis)

            active = jax.nn.relu(jnp.einsum("btd,hdn->bhtn", hear("encoder", x), encoder))
            active = constrain(active, "window", "group", None, None)
            read = attention.rotate_neighbours(active, at, ROTARY_BASE)
            mixed, state = attention.attend_linearly(read, x, mask, state)
            mixed = hear("encoder_v", normalise(mixed), axis=2)
            gated = active * jax.nn.relu(jnp.einsum("bhtd,hdn->bhtn", mixed, encoder_v))
            said = jnp.einsum("bhtn,hnd->btd", hear("decoder", gated, axis=2), decoder)
            said = constrain(said, "window", None, None)
            return normalise(x + normalise(said)), kept and (state, after)

        if s.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        x, cache = jax.lax.scan(layer, normalise(x), cache, length=s.layers)
        return unembed(constrain(x[:, -1:] if last else x, *s.stream_axes), params), cache


def normalise(x: Array) -> Array:
    """LayerNorm (arXiv 1607.06450) over the last axis, nothing learned, in float32."""
    wide = x.astype(jnp.float32)
    return rms_normalize(wide - jnp.mean(wide, axis=-1, keepdims=True), 1e-5).astype(x.dtype)
