"""What training, evaluation and sampling need of a model, whatever it is made of.

For: the one interface of our decoder and every baseline, and the two ends of a language model. Not
for: what only some have (stages, rounds), or drawing tokens (`sampling.py`).
"""

from functools import partial
from typing import Any, Protocol

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core.params import ParamInfo
from ngc_jax.data.batches import Batch
from ngc_jax.nn.mesh import constrain, num_shards

Array = jax.Array
Params = dict[str, Any]
Pair = tuple[Array, Any]  # an array, and what goes with it: records, or a cache
Maybe = Array | None


class LanguageModel(Protocol):
    """Functions of one shape; holds no arrays. Axes: B batch, T tokens, D width, V vocabulary."""

    shape: Any  # sizes: a frozen dataclass with `vocab` and, for `embed`, `stream_axes`

    def init(self, key: Array) -> Params:
        """Parameters, float32."""

    def param_info(self) -> Params:
        """The record (`core/params.py`) of each parameter, as a tree parallel to them."""

    def embed(self, params: Params, batch: Batch) -> Array:
        """The stream [B, T, D] of what a batch gives to read: here of tokens, inputs [B, T]."""
        chex.assert_rank(batch.inputs, 2)
        if batch.segments is not None:
            chex.assert_shape(batch.segments, batch.inputs.shape)
        table = constrain(params["embed"], None, "group")
        return constrain(table[batch.inputs], *self.shape.stream_axes)

    def apply(self, params: Params, batch: Batch, record: bool = False) -> Pair:
        """Logits [B, T, V] in float32, computed in the dtype of `params`; records, if asked for."""
        x = self.embed(params, batch)
        return self.forward(params, x, jnp.arange(x.shape[1]), batch.segments, None)[0], None

    def dropped(self, params: Params, key: Array) -> Params:
        """The parameters of an update: what they drop, if anything, follows from the key."""
        return params

    def decode(
        self, params: Params, tokens: Array, cache: Any, position: Array, last: bool = False
    ) -> Pair:
        """Logits [B, T, V] for tokens at `position` and after, with what came before in `cache`.

        last: of the last token alone, [B, 1, V].
        """
        x, at = self.embed(params, Batch(tokens)), position + jnp.arange(tokens.shape[1])
        return self.forward(params, x, at, None, cache, last)

    def forward(
        self, params: Params, x: Array, at: Array, segments: Maybe, cache: Any, last: bool = False
    ) -> Pair:
        """Logits of the stream [B, T, D] at positions [T], and the cache after them if any.

        last: of the last position alone.
        """

    def unstack(self, params: Params) -> Params:
        """The same parameters laid out so that `decode` reads them soonest."""
        return params

    def init_cache(self, batch: int, length: int, dtype: Any = ...) -> Any:
        """What `decode` starts from, for `length` tokens."""

    def generated(self) -> dict[str, dict[str, int]]:
        """Weights generated in a forward pass, {stack: {synapse: count}}; {}: all are stored."""
        return {}


def init_ends(shape: Any, embed: Array, unembed: Array) -> Params:
    """The table of embeddings, the last norm's scale and the matrix of logits, from two keys.

    Where `shape.tied`, the table is the matrix of logits too, which then begin with variance 1.
    """
    if shape.tied:
        table = jax.random.normal(embed, (shape.vocab, shape.width)) * shape.width**-0.5
        return {"embed": table, "norm": {"scale": jnp.ones(shape.width)}}
    # Logits start near zero: training starts from the uniform distribution, ln V nats.
    return {
        "embed": jax.random.normal(embed, (shape.vocab, shape.width)),
        "norm": {"scale": jnp.ones(shape.width)},
        "unembed": jax.random.normal(unembed, (shape.width, shape.vocab)) / shape.width,
    }


def end_info(tied: bool = False) -> Params:
    """The records of embed [V, D] and, unless it is `tied` to that, unembed [D, V]."""
    info = partial(ParamInfo, "embedding")
    table = {"embed": info((None, "channel"))}
    return table if tied else table | {"unembed": info(("channel", "vocab"))}


def unembed(x: Array, params: Params) -> Array:
    """Logits [B, T, V] in float32 for x [B, T, D]; tied ends read them by the embeddings."""
    matrix = params["unembed"] if "unembed" in params else params["embed"].T
    # Groups on N devices: each has a part of the vocabulary if N divides it and gets all of x; else
    # (bytes, a small matrix) each takes a part of the tokens and gets the matrix.
    split = matrix.shape[1] % num_shards("vocab") == 0
    tokens, vocab = ("window", "vocab") if split else ("row", None)
    rows = constrain(x.reshape(-1, x.shape[-1]), tokens, None)
    logits = constrain(rows @ constrain(matrix, None, vocab), tokens, vocab)
    return logits.reshape(*x.shape[:-1], -1).astype(jnp.float32)
