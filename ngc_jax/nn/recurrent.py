"""The recurrent language model: embed, a stack of cells that hear the stream token by token,
logits.

For: streams. What it has heard is one state for each cell, however long that was, so that a token
costs the same at any length. With the same functions as `Decoder`. Not for: what a cell holds
(`layers.py`), the loop over tokens (`core/recurrence.py`), or what only the decoder has: attention,
prelude and coda, gates, wirings that change.

Axes: B batch, T tokens, D width, V vocabulary, C cells.
"""

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core.recurrence import in_chunks
from ngc_jax.nn.layers import Cell, RMSNorm, unembed
from ngc_jax.nn.mesh import constrain, gathered
from ngc_jax.nn.shape import ModelShape

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """Functions of one shape, whose `core` counts cells; holds no arrays."""

    shape: ModelShape

    def init(self, key: Array) -> Params:
        """Parameters, float32. Cells lie behind one another on a leading axis."""
        s = self.shape
        embed, cells, unembed = jax.random.split(key, 3)
        cell = partial(Cell(s).init, x=jnp.zeros((1, 1, s.width)), state=jnp.zeros((1, s.width)))
        return {
            "embed": jax.random.normal(embed, (s.vocab, s.width)),
            "cells": jax.vmap(lambda k: cell(k)["params"])(jax.random.split(cells, s.core)),
            "norm": {"scale": jnp.ones(s.width)},
            # Logits start near zero, so training starts from the uniform distribution, ln V nats
            # per token.
            "unembed": jax.random.normal(unembed, (s.width, s.vocab)) / s.width,
        }

    def apply(
        self, params: Params, tokens: Array, segments: Array | None = None, record: bool = False
    ) -> tuple[Array, None]:
        """Logits [B, T, V] in float32 for tokens [B, T], and None, since there is nothing to
        `record`.

        Computes in the dtype of `params`. segments [B, T], if given, number the documents: each
        begins with a state of 0. Gradients do not pass from one chunk of `shape.chunk` tokens to
        another.
        """
        chex.assert_rank(tokens, 2)
        first = None
        if segments is not None:
            chex.assert_equal_shape([tokens, segments])
            first = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        return self._forward(params, tokens, first, self.init_cache(tokens.shape[0], 0))[0], None

    def decode(
        self, params: Params, tokens: Array, cache: Array, position: Array
    ) -> tuple[Array, Array]:
        """Logits [B, T, V] for the tokens after those that made `cache`; their `position` does not
        matter.
        """
        return self._forward(params, tokens, None, cache)

    def unstack(self, params: Params) -> Params:
        """Parameters as they are: cells are few."""
        return params

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Array:
        """The cells' states before the first token: [C, B, D], however many tokens (`length`) will
        come.
        """
        return jnp.zeros(
            (self.shape.core, batch, self.shape.width), jnp.promote_types(dtype, jnp.float32)
        )

    def generated(self) -> dict[str, dict[str, int]]:
        """Weights generated in a forward pass without chunks: each cell's once, for all tokens."""
        s = self.shape
        if s.rule == "dense":
            return {}
        square, tall = s.core * s.width * s.width, s.core * s.width * s.hidden
        return {"cells": {"token": 2 * tall, "gate_up": 2 * tall, "down": tall, "out": square}}

    def _forward(
        self, params: Params, tokens: Array, first: Array | None, states: Array
    ) -> tuple[Array, Array]:
        cell = Cell(self.shape)

        def run(states: Array, heard: tuple[Array, Array | None]) -> tuple[Array, Array]:
            tokens, first = jax.tree.map(jnp.transpose, heard)
            x = constrain(constrain(params["embed"], None, None)[tokens], "window", None, None)

            def body(x: Array, layer: tuple[Params, Array]) -> Any:
                weights, state = layer
                return cell.apply({"params": gathered(weights)}, x, state, first)

            if self.shape.remat == "stages":
                body = jax.checkpoint(body, prevent_cse=False)
            x, states = jax.lax.scan(body, x, (params["cells"], states))
            x = jnp.asarray(RMSNorm().apply({"params": params["norm"]}, x))
            return states, unembed(x, params["unembed"]).swapaxes(0, 1)

        heard = jax.tree.map(jnp.transpose, (tokens, first))  # chunks are cut along the first axis
        states, logits = in_chunks(run, states, heard, self.shape.chunk)
        return logits.swapaxes(0, 1), states
