"""The recurrent model: embed, a stack of cells that hear the stream token by token, logits.

For: streams. What a cell has heard is one state, however long that was, so a token costs the same
at any length. The functions are those of `model.py`. Not for: what a cell holds (`layers.py`), the
loop over tokens (`core/recurrence.py`), or what only the decoder has: attention, prelude and coda,
gates, wirings that change.

Axes: B batch, T tokens, D width, V vocabulary, C cells.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core.params import ParamInfo
from ngc_jax.core.recurrence import in_chunks
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import end_info
from ngc_jax.nn.layers import Cell, RMSNorm, unembed
from ngc_jax.nn.mesh import constrain, gathered
from ngc_jax.nn.params import describe, stacked
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
        x, state = jnp.zeros((1, 1, s.width)), jnp.zeros((1, s.width))
        cell = partial(Cell(s).init, x=x, state=state)
        return {
            "embed": jax.random.normal(embed, (s.vocab, s.width)),
            "cells": jax.vmap(lambda k: cell(k)["params"])(jax.random.split(cells, s.core)),
            "norm": {"scale": jnp.ones(s.width)},
            # Logits start near zero: training starts from the uniform distribution, ln V nats.
            "unembed": jax.random.normal(unembed, (s.width, s.vocab)) / s.width,
        }

    def param_info(self) -> Params:
        """The record of each parameter, as a tree parallel to them."""
        cells, norm = stacked(self.cell_info, "stage"), ParamInfo("scale", (None,))
        return {"cells": cells, "norm": {"scale": norm}, **end_info()}

    @functools.cached_property
    def cell_info(self) -> Params:
        """The records of one cell's parameters."""
        width = self.shape.width
        return describe(Cell(self.shape), jnp.zeros((1, 1, width)), jnp.zeros((1, width)))

    def embed(self, params: Params, batch: Batch) -> Array:
        """The stream [B, T, D] of a batch's tokens, batch.inputs [B, T]."""
        chex.assert_rank(batch.inputs, 2)
        return constrain(constrain(params["embed"], None, None)[batch.inputs], "window", None, None)

    def apply(self, params: Params, batch: Batch, record: bool = False) -> tuple[Array, None]:
        """Logits [B, T, V] in float32, and None, since there is nothing to `record`.

        Computes in the dtype of `params`. Each document (`batch.segments`) begins with a state of
        0. Gradients do not pass from one chunk of `shape.chunk` tokens to another.
        """
        x, segments, first = self.embed(params, batch), batch.segments, None
        if segments is not None:
            chex.assert_shape(segments, x.shape[:2])
            first = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        return self._forward(params, x, first, self.init_cache(len(x), 0))[0], None

    def decode(
        self, params: Params, tokens: Array, cache: Array, position: Array
    ) -> tuple[Array, Array]:
        """Logits [B, T, V] for the tokens after those that made `cache`, at any `position`."""
        return self._forward(params, self.embed(params, Batch(tokens)), None, cache)

    def unstack(self, params: Params) -> Params:
        """Parameters as they are: cells are few."""
        return params

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Array:
        """The cells' states before the first token: [C, B, D], for any `length`."""
        shape = (self.shape.core, batch, self.shape.width)
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))

    def generated(self) -> dict[str, dict[str, int]]:
        """Weights generated in a forward pass without chunks: each cell's once, for all tokens."""
        s = self.shape
        if s.rule == "dense":
            return {}
        square, tall = s.core * s.width * s.width, s.core * s.width * s.hidden
        return {"cells": {"token": 2 * tall, "gate_up": 2 * tall, "down": tall, "out": square}}

    def _forward(
        self, params: Params, x: Array, first: Array | None, states: Array
    ) -> tuple[Array, Array]:
        cell = Cell(self.shape)

        def run(states: Array, heard: tuple[Array, Array | None]) -> tuple[Array, Array]:
            x, first = jax.tree.map(lambda a: a.swapaxes(0, 1), heard)

            def body(x: Array, layer: tuple[Params, Array]) -> Any:
                weights, state = layer
                return cell.apply(
                    {"params": gathered(weights, lambda: self.cell_info)}, x, state, first
                )

            if self.shape.remat == "stages":
                body = jax.checkpoint(body, prevent_cse=False)
            x, states = jax.lax.scan(body, x, (params["cells"], states))
            x = jnp.asarray(RMSNorm().apply({"params": params["norm"]}, x))
            return states, unembed(x, params["unembed"]).swapaxes(0, 1)

        heard = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, first))  # chunks are cut along axis 0
        states, logits = in_chunks(run, states, heard, self.shape.chunk)
        return logits.swapaxes(0, 1), states
