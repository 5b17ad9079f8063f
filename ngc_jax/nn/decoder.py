"""The decoder: embed, prelude stages, core stages in rounds, coda stages, logits.

For: the order of things and the loops. Not for: what a stage holds (`layers.py`), sizes
(`shape.py`), or how parameters lie (`stacks.py`). A model of another kind is a file beside this one
(`recurrent.py`, `bdh.py`), with the functions of `model.py`.

Axes: B batch, T tokens, D width, V vocabulary, R rounds.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core.communicate import (
    Turn,
    advance,
    communicate,
    communicate_per_example,
    communicate_until_settled,
    undisturbed,
)
from ngc_jax.core.params import ParamInfo
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics.measures import Round
from ngc_jax.nn import stacks
from ngc_jax.nn.layers import KEPT, RMSNorm, Stage, unembed
from ngc_jax.nn.mesh import constrain, gathered
from ngc_jax.nn.params import describe, stacked
from ngc_jax.nn.shape import ModelShape

Array = jax.Array
Params = dict[str, Any]
Update = Callable[[Array, Any], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Functions of one model shape; holds no arrays.

    Parameters do not depend on `shape.rounds`, but for their scale at the start: see `at`.
    """

    shape: ModelShape

    def at(self, rounds: int) -> Self:
        """The same model with another number of rounds; it takes the same parameters."""
        return self.reshaped(rounds=rounds)

    def reshaped(self, **fields: Any) -> Self:
        """The same model, of the same class, with other values of some fields of `shape`."""
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, **fields))

    def init(self, key: Array) -> Params:
        """Parameters, float32; `stacks.py` says how they lie."""
        s = self.shape
        embed, prelude, core, coda, unembed = jax.random.split(key, 5)
        x, positions = jnp.zeros((1, 1, s.width)), jnp.zeros((1,), jnp.int32)
        stage = partial(Stage(s).init, x=x, positions=positions)
        # All stages are drawn at once: a program that draws each stack by itself compiles 3 times
        # as long.
        counts = ((prelude, s.prelude), (core, s.core), (coda, s.coda))
        keys = jnp.concatenate([jax.random.split(k, count) for k, count in counts])
        stages = jax.vmap(lambda k: stage(k)["params"])(keys)
        rest: Params = {
            "embed": jax.random.normal(embed, (s.vocab, s.width)),
            "norm": {"scale": jnp.ones(s.width)},
            # Logits start near zero: training starts from the uniform distribution, ln V nats.
            "unembed": jax.random.normal(unembed, (s.width, s.vocab)) / s.width,
        }
        if s.core:
            # keep + drive = 1 at start: where core(x) is small, the loop rests at its input.
            leak = jnp.full(s.width, jnp.log(jnp.expm1(-jnp.log(s.keep))))
            drive = {"drive": jnp.full(s.width, 1 - s.keep)} if s.drive else {}
            rest["core"] = {"leak": leak, **drive}
        take = lambda tree, rows: jax.tree.map(lambda p: p[rows], tree)  # noqa: E731
        return stacks.arrange(s, stages, self.stage_info, rest, take)

    def param_info(self) -> Params:
        """The record of each parameter, as a tree parallel to them."""
        s, scale = self.shape, ParamInfo("scale", (None,))
        rest: Params = {"norm": {"scale": scale}, **end_info()}
        if s.core:
            rest["core"] = {"leak": scale, **({"drive": scale} if s.drive else {})}
        stages = stacked(self.stage_info, "stage")
        return stacks.arrange(s, stages, self.stage_info, rest, lambda tree, rows: tree)

    @functools.cached_property
    def stage_info(self) -> Params:
        """The records of one stage's parameters."""
        x, positions = jnp.zeros((1, 1, self.shape.width)), jnp.zeros((1,), jnp.int32)
        return describe(Stage(self.shape), x, positions)

    def embed(self, params: Params, batch: Batch) -> Array:
        """The stream [B, T, D] of a batch's tokens, batch.inputs [B, T]."""
        chex.assert_rank(batch.inputs, 2)
        table = constrain(params["embed"], None, "group")
        return constrain(table[batch.inputs], *self.shape.stream_axes)

    def unembed(self, params: Params, x: Array) -> Array:
        """Logits [B, T, V] in float32 of the stream [B, T, D] after the last stage."""
        x = jnp.asarray(RMSNorm().apply({"params": params["norm"]}, x))
        return unembed(constrain(x, *self.shape.stream_axes), params["unembed"])

    def apply(
        self, params: Params, batch: Batch, record: bool = False
    ) -> tuple[Array, Round | None]:
        """Logits [B, T, V] in float32, and the rounds' stability records [R] if asked for.

        Computes in the dtype of `params`.
        """
        x, _, records = self.stream(
            params, self.embed(params, batch), batch.segments, record=record
        )
        return self.unembed(params, x), records

    def iterate(
        self,
        params: Params,
        batch: Batch,
        *,
        rounds: Array,
        backprop: int = 0,
        most: int | None = None,
        every: int = 0,
        disturb: Callable[[Array, Array], Array] = undisturbed,
    ) -> tuple[Array, Array]:
        """`apply` for a number of rounds that is an array, [] or [B] int32.

        Gradients go through the last `backprop` rounds. most: a bound of `rounds` that is known
        before, if there is one; where it is `backprop` no round is without gradients. Returns
        logits [S, B, T, V], the last of them after the last round, and the rounds [S, B] made
        there; see `communicate_per_example`, also for `every` and `disturb`. Raises ValueError for
        a model without a loop.
        """
        params, x = self.loop_start(params, self.embed(params, batch), batch.segments)
        held = jax.lax.stop_gradient((params, x))
        states, made = communicate_per_example(
            self.turn(params, x, batch.segments),
            x,
            jnp.broadcast_to(rounds, x.shape[:1]),
            backprop=backprop,
            still=None if most == backprop else self.turn(*held, batch.segments),
            every=every,
            remat=self.shape.remat != "none",
            disturb=disturb,
        )
        # One after another, so that the coda is compiled once.
        return jax.lax.map(lambda x: self._read_out(params, x, batch.segments), states), made

    def settle(
        self, params: Params, batch: Batch, *, tolerance: Array | float, cap: int
    ) -> tuple[Array, Array]:
        """`apply` with rounds until the state settles, `cap` at most.

        Returns logits [B, T, V], and the rounds of each token [B, T]; see
        `communicate_until_settled`. Raises ValueError for a model without a loop.
        """
        params, x = self.loop_start(params, self.embed(params, batch), batch.segments)
        turn = self.turn(params, x, batch.segments)
        x, rounds = communicate_until_settled(turn, x, tolerance, cap)
        return self._read_out(params, x, batch.segments), rounds

    def decode(
        self, params: Params, tokens: Array, cache: Params, position: Array
    ) -> tuple[Array, Params]:
        """Logits [B, T, V] for tokens at `position` and after, with what came before in `cache`.

        `params` as `init` makes them, or `unstack`. From states where there are any, whatever the
        model's form: for a few tokens reading what they are multiplied by takes longest, and states
        are less than weights.
        """
        form = "weights" if self.shape.rule == "dense" else "signals"
        sparing = self.reshaped(form=form)
        positions = position + jnp.arange(tokens.shape[1])
        x = sparing.embed(params, Batch(tokens))
        x, cache, _ = sparing.stream(params, x, None, positions, cache)
        return sparing.unembed(params, x), cache

    def unstack(self, params: Params) -> Params:
        """The same parameters laid out for `decode`: see `stacks.unstack`."""
        return stacks.unstack(self.shape, params)

    def expand_shared(self, params: Params) -> Params:
        """Parameters in which each stage has its own send states."""
        return stacks.expand_shared(self.shape, params)

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Params:
        """An empty key-value cache for `length` tokens: every stage in every round keeps its own.

        Stages lie apart, and are written in place; the rounds of a stage lie on a leading axis.
        Raises ValueError for a model that is not causal, whose tokens wait for those after them.
        """
        s = self.shape
        if not s.causal:
            raise ValueError("causal=False: such a model reads all at once, and has no cache")

        def caches(stages: int, *leading: int) -> tuple[Params, ...]:
            shape = (*leading, batch, length, s.heads, s.width // s.heads)
            # Arrays of its own for each, so that a step may donate them.
            return tuple(
                {name: jnp.zeros(shape, dtype) for name in ("key", "value")} for _ in range(stages)
            )

        return {
            "prelude": caches(s.prelude),
            "core": caches(s.core, s.rounds),
            "coda": caches(s.coda),
        }

    def generated(self) -> dict[str, dict[str, int]]:
        """Weights generated in a forward pass: those of every stage, each time it is run."""
        s = self.shape
        if s.rule == "dense":
            return {}
        square, tall = s.width * s.width, s.width * s.hidden
        stage = {
            "query_key_value": 3 * square,
            "attention_out": square,
            "gate_up": 2 * tall,
            "down": tall,
        }
        runs = {"prelude": s.prelude, "core": s.core * s.rounds, "coda": s.coda}
        return {
            stack: {name: times * count for name, count in stage.items()}
            for stack, times in runs.items()
        }

    def loop_start(
        self, params: Params, x: Array, segments: Array | None = None
    ) -> tuple[Params, Array]:
        """Expanded parameters, and the stream before the first round, from the embedded one.

        Raises ValueError for a model without a loop.
        """
        if not self.shape.core:
            raise ValueError("model: has no loop (model.core=0), so there are no rounds to choose")
        params = self.expand_shared(params)
        return params, self.stages(stacks.get_stack(params, "prelude"), x, segments)[0]

    def update(
        self,
        params: Params,
        start: Array,
        segments: Array | None = None,
        positions: Array | None = None,
    ) -> Update:
        """What a round adds, update(x, cache) -> (core(x), cache), in the loop begun at `start`."""
        route = self.route(start)

        def update(x: Array, memory: Any) -> tuple[Array, Any]:
            core = params["core"]["stages"]
            after, memory = self.stages(core, x, segments, positions, memory, route)
            return after - x, memory

        return update

    def turn(self, params: Params, start: Array, segments: Array | None = None) -> Turn:
        """One round, x -> phi(keep x + drive e + core(x)) with e = `start` held.

        `params` must be expanded (`expand_shared`).
        """
        keep, drive = self.scales(params)
        update = self.update(params, start, segments)
        phi = self.shape.state_activation
        return lambda x: advance(x, update(x, None)[0], drive * start, keep, phi)

    def route(self, start: Array) -> Array | None:
        """What queries and keys are read from in the loop begun at `start`; None: the state."""
        return start if self.shape.route == "start" else None

    def scales(self, params: Params) -> tuple[Array, Array]:
        """keep and drive [D]: the leak exp(-softplus(a)), in (0, 1), and the external potential."""
        keep = jnp.exp(-jax.nn.softplus(params["core"]["leak"]))
        return keep, params["core"]["drive"] if self.shape.drive else jnp.zeros_like(keep)

    def stages(
        self,
        stages: Any,
        x: Array,
        segments: Array | None = None,
        positions: Array | None = None,
        cache: Any = None,
        route: Array | None = None,
    ) -> tuple[Array, Any]:
        """Run stages on the stream [B, T, D]: the stream after them and the cache.

        `stages` is a stack, a tuple of stages, or None for none. Without a cache (None) it must be
        a stack, and is compiled once.
        """
        if stages is None:
            return x, cache
        stage = Stage(self.shape)
        at = jnp.arange(x.shape[1]) if positions is None else positions
        if segments is not None:
            chex.assert_shape(segments, x.shape[:2])

        def body(x: Array, layer: Any) -> tuple[Array, Any]:
            weights, kept = layer
            weights = gathered(weights, lambda: self.stage_info)
            return stage.apply({"params": weights}, x, at, segments, kept, route)

        if cache is not None:
            after = []
            apart = stages if isinstance(stages, tuple) else stacks.stages_of(stages)
            for layer in zip(apart, cache, strict=True):
                x, kept = body(x, layer)
                after.append(kept)
            return x, tuple(after)
        names = () if self.shape.remat == "stages" else KEPT
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        body = jax.checkpoint(body, prevent_cse=False, policy=policy)
        return jax.lax.scan(body, x, (stages, None))

    def stream(
        self,
        params: Params,
        x: Array,
        segments: Array | None = None,
        positions: Array | None = None,
        cache: Params | None = None,
        record: bool = False,
    ) -> tuple[Array, Params, Round | None]:
        """All stages on the embedded stream [B, T, D]: the stream, the cache, the records.

        segments [B, T], if given, number the documents, and a token sees its own. positions [T] are
        0, 1, ... by default.
        """
        s, cache, records = self.shape, dict(cache or {}), None
        params = self.expand_shared(params)

        def run(name: str, x: Array) -> tuple[Array, Any]:
            stack = stacks.get_stack(params, name)
            return self.stages(stack, x, segments, positions, cache.get(name))

        x, cache["prelude"] = run("prelude", x)
        if s.core:
            keep, drive = self.scales(params)
            x, cache["core"], records = communicate(
                self.update(params, x, segments, positions),
                x,
                keep=keep,
                drive=drive,
                rounds=s.rounds,
                activation=s.state_activation,
                remat=s.remat != "none",
                record=record,
                memory=cache.get("core"),
            )
        x, cache["coda"] = run("coda", x)
        return x, cache, records

    def _read_out(self, params: Params, x: Array, segments: Array | None) -> Array:
        """Logits [B, T, V] of the stream after some round; `params` must be expanded."""
        return self.unembed(params, self.stages(stacks.get_stack(params, "coda"), x, segments)[0])


def end_info() -> Params:
    """The records of a language model's two ends, embed [V, D] and unembed [D, V]."""
    return {
        "embed": ParamInfo("embedding", (None, "channel")),
        "unembed": ParamInfo("embedding", ("channel", "vocab")),
    }
