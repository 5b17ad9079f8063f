"""The recurrent model: embed, a stack of cells that hear the stream token by token, logits.

For: streams. What a cell has heard is one state, so a token costs the same at any length. Not for:
the loop over tokens (`core/recurrence.py`). Axes: B batch, T tokens, D width, C cells.
"""

import dataclasses
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ngc_jax.core.params import ParamInfo
from ngc_jax.core.recurrence import along_tokens, in_chunks, time_scales
from ngc_jax.core.rules import activate
from ngc_jax.nn.layers import RMSNorm, rms_normalize
from ngc_jax.nn.mesh import gathered
from ngc_jax.nn.model import LanguageModel, Maybe, Pair, Params, end_info, init_ends, unembed
from ngc_jax.nn.params import STAGES, declare_scale, describe, drop_states, stacked
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.stacks import KEY, keyed, unkeyed
from ngc_jax.nn.synapse import Synapse

Array = jax.Array


class Cell(nn.Module):
    """A state that hears the stream token by token: x [B, T, D], state [B, D] -> (x, state).

    With e the normed stream, n(h) = h / rms(h), keep = exp(-softplus(leak)) and pace = sqrt(1 -
    keep^2), which keeps a state's variance at 1 (LRU, arXiv 2303.06349), a round at a token is h <-
    keep h + pace (drive e + MLP(n(h), e)), where gate and up of the MLP each sum what the state and
    what the token says. So the token multiplies the state, without which no linear recurrence keeps
    track of a parity (arXiv 2404.08819). first [B, T], bool: where a document, a new state, begins.
    """

    shape: ModelShape

    @nn.compact
    def __call__(self, x: Array, state: Array, first: Array | None = None) -> tuple[Array, Array]:
        s = self.shape
        drop = nn.Dropout(s.dropout, deterministic=not self.has_rng(KEY))
        senders, half = s.shared.of("gate_up"), 0.5**0.5  # two readers' sum has unit variance
        parts = s.parts(s.width, s.hidden)
        reader = partial(Synapse, parts, s.width, s.hidden, s.form, senders, half)
        back = partial(Synapse, n_out=s.width, form=s.form, split="in")
        e = RMSNorm(name="norm")(x)
        told = reader(name="token")(e)
        listen = reader(name="gate_up").opened()
        down = back(s.parts(s.hidden, s.width), s.hidden, name="down").opened()
        rounds = s.rounds * time_scales(s.width, s.groups, s.context)  # that neurons remember for
        start = jnp.log(jnp.expm1(1 / jnp.asarray(rounds, jnp.float32)))
        leak = declare_scale(self, "leak", lambda _, shape: start.reshape(shape), s.width)
        keep = jnp.exp(-jax.nn.softplus(leak.astype(jnp.float32)))
        pace = jnp.sqrt(1 - jnp.square(keep))
        drive = declare_scale(self, "drive", nn.initializers.ones, s.width) if s.drive else 0.0

        def turn(h: Array, said: tuple[Array, Array]) -> Array:
            e, told = said
            both = told + listen(rms_normalize(h).astype(told.dtype))
            gate = activate(both[:, 0], s.exchange_activation)
            return keep * h + pace * (drive * e + down(gate * both[:, 1])[:, 0])

        remat = s.remat != "none"
        said, first = jax.tree.map(lambda a: a.swapaxes(0, 1), ((e, told), first))
        state, states = along_tokens(turn, state, said, first, rounds=s.rounds, remat=remat)
        out = back(s.parts(s.width, s.width), s.width, gain=s.core**-0.5, name="out")
        return x + drop(out(rms_normalize(states.swapaxes(0, 1)).astype(x.dtype))[..., 0, :]), state


@dataclasses.dataclass(frozen=True)
class Recurrent(LanguageModel):
    """Functions of one shape, whose `core` counts cells; holds no arrays."""

    shape: ModelShape

    def init(self, key: Array) -> Params:
        s = self.shape
        embed, cells, unembed = jax.random.split(key, 3)
        start = (jnp.zeros((1, 1, s.width)), jnp.zeros((1, s.width)))
        drawn = jax.vmap(lambda k: Cell(s).init(k, *start)["params"])
        return init_ends(s, embed, unembed) | {"cells": drawn(jax.random.split(cells, s.core))}

    def param_info(self) -> Params:
        cells, norm = stacked(self.cell_info, "stage"), ParamInfo("scale", (None,))
        return {"cells": cells, "norm": {"scale": norm}, **end_info(self.shape.tied)}

    @cached_property
    def cell_info(self) -> Params:
        """The records of one cell's parameters."""
        width = self.shape.width
        return describe(Cell(self.shape), jnp.zeros((1, 1, width)), jnp.zeros((1, width)))

    def dropped(self, params: Params, key: Array) -> Params:
        s = self.shape
        params = drop_states(params, self.param_info(), s.state_dropout, key)
        if not s.dropout:
            return params
        keys = jax.random.split(jax.random.fold_in(key, STAGES), s.core)
        return params | {"cells": keyed(params["cells"], keys)}  # in each chunk of tokens the same

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Array:
        """The cells' states before the first token: [C, B, D], for any `length`."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return jnp.zeros((self.shape.core, batch, self.shape.width), wide)

    def generated(self) -> dict[str, dict[str, int]]:
        # Without chunks: each cell's once, for all tokens.
        s = self.shape
        if s.rule == "dense":
            return {}
        square, tall = s.core * s.width * s.width, s.core * s.width * s.hidden
        return {"cells": {"token": 2 * tall, "gate_up": 2 * tall, "down": tall, "out": square}}

    def forward(
        self, params: Params, x: Array, at: Array, segments: Maybe, cache: Any, last: bool = False
    ) -> Pair:
        """Each document begins with a state of 0; gradients stay in chunks of `shape.chunk`."""
        cell, first = Cell(self.shape), None
        if segments is not None:
            first = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        states = self.init_cache(len(x), 0) if cache is None else cache

        def run(states: Array, heard: tuple[Array, Array | None]) -> tuple[Array, Array]:
            x, first = jax.tree.map(lambda a: a.swapaxes(0, 1), heard)

            def body(x: Array, layer: tuple[Params, Array]) -> Any:
                weights, rngs = unkeyed(layer[0])
                weights = gathered(weights, lambda: self.cell_info)
                return cell.apply({"params": weights}, x, layer[1], first, rngs=rngs)

            if self.shape.remat == "stages":
                body = jax.checkpoint(body, prevent_cse=False)
            x, states = jax.lax.scan(body, x, (params["cells"], states))
            x = jnp.asarray(RMSNorm().apply({"params": params["norm"]}, x))
            return states, unembed(x, params).swapaxes(0, 1)

        heard = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, first))  # chunks are cut along axis 0
        states, logits = in_chunks(run, states, heard, self.shape.chunk)
        return logits.swapaxes(0, 1)[:, -1:] if last else logits.swapaxes(0, 1), states
