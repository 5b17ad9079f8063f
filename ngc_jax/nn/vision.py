"""A decoder's stages on patches of an image, all of which see each other: classes out.

For: both ends of such a model. Not for: what lies between, which is the decoder's. After the Vision
Transformer (arXiv 2010.11929). Axes: B images, S pixels a side, C colours, T tokens, D width, V
classes; a token is a patch, in front of them the class token where there is one.
"""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core.params import ParamInfo
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.mesh import constrain
from ngc_jax.nn.model import Pair, Params, end_info, init_ends
from ngc_jax.nn.shape import ModelShape

Array = jax.Array
STD = 0.5  # of positions at the start, half that of patches


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionShape(ModelShape):
    """Sizes of a vision model: `config.model`, and of the images, `config.data`."""

    causal: bool = False
    image_size: int = 8
    colours: int = 1
    patch: int = 2  # pixels of a patch's side
    readout: str = "mean"  # of all tokens, or of the "class" token

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image_size // self.patch) ** 2 + (self.readout == "class")

    def positions(self, tokens: int) -> Array:
        """All at one place, where rotary positions turn nothing: learned ones say where."""
        return jnp.zeros(tokens, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Vision(Decoder):
    """Functions of one shape; holds no arrays. A batch has inputs [B, S, S, C], targets [B, 1]."""

    shape: VisionShape

    def init_ends(self, embed: Array, unembed: Array) -> Params:
        s, (patch, position) = self.shape, jax.random.split(embed)
        numbers = s.patch**2 * s.colours
        own = {"patch": jax.random.normal(patch, (numbers, s.width)) * numbers**-0.5}
        own["position"] = STD * jax.random.normal(position, (s.tokens, s.width))
        return init_ends(s, embed, unembed) | {"embed": own}

    def end_info(self) -> Params:
        patch = ParamInfo("matrix", (None, "channel"), matrix=-2)
        position = ParamInfo("scale", (None, None))
        return end_info() | {"embed": {"patch": patch, "position": position}}

    def embed(self, params: Params, batch: Batch) -> Array:
        """The stream [B, T, D] of images [B, S, S, C]: linear in each patch, plus its position."""
        s, own = self.shape, params["embed"]
        chex.assert_shape(batch.inputs, (None, s.image_size, s.image_size, s.colours))
        x = patches(batch.inputs, s.patch).astype(own["patch"].dtype)
        x = x @ constrain(own["patch"], None, "group")
        if s.readout == "class":  # which is its position alone
            x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        return constrain(x + own["position"], *s.stream_axes)

    def read(self, x: Array) -> Array:
        return x[:, :1] if self.shape.readout == "class" else jnp.mean(x, axis=1, keepdims=True)

    def settle(self, params: Params, batch: Batch, **how: Any) -> Pair:
        """As the decoder's; the rounds [B, 1] are the mean over an image's tokens."""
        logits, rounds = super().settle(params, batch, **how)
        return logits, jnp.mean(rounds, axis=1, keepdims=True)


def patches(images: Array, side: int) -> Array:
    """Images [B, S, S, C] as their squares of so many pixels, row by row: [B, T, side side C]."""
    batch, size, _, colours = images.shape
    count = size // side
    cut = images.reshape(batch, count, side, count, side, colours).swapaxes(2, 3)
    return cut.reshape(batch, count * count, -1)
