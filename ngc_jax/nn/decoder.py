"""The decoder language model: embed, prelude stages, core stages in rounds of communication, coda
stages, logits.

For: the order of things and the loops. Not for: what a stage holds (`layers.py`) or sizes
(`shape.py`). A model of another kind is a file beside this one (`recurrent.py`, `bdh.py`), with the
functions of `model.py`.

Axes: B batch, T tokens, D width, V vocabulary, R rounds.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ngc_jax.core.communicate import (
    Turn,
    advance,
    communicate,
    communicate_per_example,
    communicate_until_settled,
    undisturbed,
)
from ngc_jax.dynamics.measures import Round
from ngc_jax.nn.layers import KEPT, RMSNorm, Stage, unembed
from ngc_jax.nn.mesh import constrain, gathered
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.sharing import leaders, spread

Array = jax.Array
Params = dict[str, Any]
Update = Callable[[Array, Any], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Functions of one model shape; holds no arrays.

    Parameters do not depend on `shape.rounds`, but for their scale at the start: see `at`.
    """

    shape: ModelShape

    def at(self, rounds: int) -> "Decoder":
        """The same model with another number of rounds; it takes the same parameters."""
        return Decoder(dataclasses.replace(self.shape, rounds=rounds))

    def init(self, key: Array) -> Params:
        """Parameters, float32. Stages of a stack lie behind one another on a leading axis."""
        s = self.shape
        embed, prelude, core, coda, unembed = jax.random.split(key, 5)
        stage = partial(
            Stage(s).init, x=jnp.zeros((1, 1, s.width)), positions=jnp.zeros((1,), jnp.int32)
        )
        # All stages in one go and then apart: a program that draws for each stack by itself
        # compiles 3 times as long.
        stacks = ((prelude, s.prelude), (core, s.core), (coda, s.coda))
        keys = jnp.concatenate([jax.random.split(k, count) for k, count in stacks])
        stages = jax.vmap(lambda k: stage(k)["params"])(keys)
        params: Params = {
            "embed": jax.random.normal(embed, (s.vocab, s.width)),
            "norm": {"scale": jnp.ones(s.width)},
            # Logits start near zero, so training starts from the uniform distribution, ln V nats
            # per token.
            "unembed": jax.random.normal(unembed, (s.width, s.vocab)) / s.width,
        }
        sets = s.shared.stages
        if max(sets) + 1 < len(sets):
            own = flatten_dict(stages)
            shared = {
                path: own.pop(path)
                for path in [*own]
                if "pre" in path and path[0] in s.shared.over_depth
            }
            params["senders"] = unflatten_dict(
                {path: p[leaders(sets)] for path, p in shared.items()}
            )
            stages = unflatten_dict(own)
        for name, rows in self.rows().items():
            params[name] = jax.tree.map(lambda p, rows=rows: p[rows], stages)
        if s.core:
            # keep + drive = 1 at start: where core(x) is small, the loop rests at what the prelude
            # gave.
            leak = jnp.full(s.width, jnp.log(jnp.expm1(-jnp.log(s.keep))))
            drive = {"drive": jnp.full(s.width, 1 - s.keep)} if s.drive else {}
            params["core"] = {"stages": params["core"], "leak": leak, **drive}
        return params

    def rows(self) -> dict[str, slice]:
        """Where each stack that there is lies among all stages."""
        s, first, rows = self.shape, 0, {}
        for name, count in (("prelude", s.prelude), ("core", s.core), ("coda", s.coda)):
            if count:
                rows[name] = slice(first, first + count)
            first += count
        return rows

    def expand_shared(self, params: Params) -> Params:
        """Parameters in which each stage has its send states, also those that stages share
        ("senders").
        """
        if "senders" not in params:
            return params
        shared = flatten_dict(spread(self.shape.shared.stages, params["senders"]))
        return self._restacked(
            {name: leaf for name, leaf in params.items() if name != "senders"},
            lambda own, rows: unflatten_dict(
                flatten_dict(own) | {path: p[rows] for path, p in shared.items()}
            ),
        )

    def apply(
        self, params: Params, tokens: Array, segments: Array | None = None, record: bool = False
    ) -> tuple[Array, Round | None]:
        """Logits [B, T, V] in float32 for tokens [B, T], and the rounds' stability records [R] if
        asked for.

        Computes in the dtype of `params`. segments [B, T], if given, number the documents, and a
        token sees its own.
        """
        logits, _, records = self._forward(
            params, tokens, jnp.arange(tokens.shape[1]), segments, None, record
        )
        return logits, records

    def iterate(
        self,
        params: Params,
        tokens: Array,
        segments: Array | None = None,
        *,
        rounds: Array,
        backprop: int = 0,
        most: int | None = None,
        every: int = 0,
        disturb: Callable[[Array, Array], Array] = undisturbed,
    ) -> tuple[Array, Array]:
        """`apply` for a number of rounds that is an array, [] or [B] int32, with gradients through
        the last `backprop`.

        most: a bound of `rounds` that is known before, if there is one; where it is `backprop` no
        round is without gradients. Returns logits [S, B, T, V], the last of them after the last
        round, and the rounds [S, B] made there; see `communicate_per_example` for both, for `every`
        and `disturb`. Raises ValueError for a model without a loop.
        """
        params, positions, x = self._loop_begins(params, tokens, segments)
        held = jax.lax.stop_gradient((params, x))
        states, made = communicate_per_example(
            self.turn(params, x, positions, segments),
            x,
            jnp.broadcast_to(rounds, tokens.shape[:1]),
            backprop=backprop,
            still=None if most == backprop else self.turn(*held, positions, segments),
            every=every,
            remat=self.shape.remat != "none",
            disturb=disturb,
        )
        # One after another, so that the coda is compiled once.
        return jax.lax.map(lambda x: self._read_out(params, x, positions, segments), states), made

    def settle(
        self,
        params: Params,
        tokens: Array,
        segments: Array | None = None,
        *,
        tolerance: Array | float,
        cap: int,
    ) -> tuple[Array, Array]:
        """`apply` with rounds until the state settles, `cap` at most: logits [B, T, V], and the
        rounds of each [B, T].

        See `communicate_until_settled`. Raises ValueError for a model without a loop.
        """
        params, positions, x = self._loop_begins(params, tokens, segments)
        x, rounds = communicate_until_settled(
            self.turn(params, x, positions, segments), x, tolerance, cap
        )
        return self._read_out(params, x, positions, segments), rounds

    def decode(
        self, params: Params, tokens: Array, cache: Params, position: Array
    ) -> tuple[Array, Params]:
        """Logits [B, T, V] for tokens that stand at `position` and after, with what came before in
        `cache`.

        `params` as `init` makes them, or `apart`. Whatever the model's form, from states where
        there are any: for a few tokens reading what they are multiplied by takes longest, and
        states are less than weights.
        """
        sparing = Decoder(
            dataclasses.replace(
                self.shape, form="weights" if self.shape.rule == "dense" else "signals"
            )
        )
        positions = position + jnp.arange(tokens.shape[1])
        logits, cache, _ = sparing._forward(params, tokens, positions, None, cache, False)
        return logits, cache

    def unstack(self, params: Params) -> Params:
        """The same parameters with each stage's in arrays of its own, a tuple of stages for a
        stack; for `decode`.

        A loop over a stack copies a stage before it is read, and one token is multiplied by it no
        sooner than that.
        """
        return self._restacked(self.expand_shared(params), lambda stack, _: unstacked(stack))

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Params:
        """An empty key-value cache for `length` tokens: every stage in every round keeps its own.

        Stages lie apart, and are written in place; the rounds of a stage lie on a leading axis.
        Raises ValueError for a model that is not causal, whose tokens wait for those after them.
        """
        s = self.shape
        if not s.causal:
            raise ValueError(
                "causal=False: such a model reads all at once, by `apply`; it has no cache"
            )

        def caches(stages: int, *leading: int) -> tuple[Params, ...]:
            shape = (*leading, batch, length, s.heads, s.width // s.heads)
            return tuple(
                {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}
                for _ in range(stages)
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

    def update(
        self, params: Params, start: Array, positions: Array, segments: Array | None = None
    ) -> Update:
        """What a round adds to the stream, update(x, cache) -> (core(x), cache), in the loop that
        began at `start`.
        """
        route = self.route(start)

        def update(x: Array, memory: Any) -> tuple[Array, Any]:
            after, memory = self.stages(
                params["core"]["stages"], x, positions, segments, memory, route
            )
            return after - x, memory

        return update

    def turn(
        self, params: Params, start: Array, positions: Array, segments: Array | None = None
    ) -> Turn:
        """One round, x -> phi(keep x + drive e + core(x)) with e = `start` held; `params` are
        `whole`.
        """
        keep, drive = self.scales(params)
        update = self.update(params, start, positions, segments)
        return lambda x: advance(
            x, update(x, None)[0], drive * start, keep, self.shape.state_activation
        )

    def route(self, start: Array) -> Array | None:
        """What the core's queries and keys are read from, in the loop that began at `start`; None:
        the state.
        """
        return start if self.shape.route == "start" else None

    def scales(self, params: Params) -> tuple[Array, Array]:
        """keep and drive [D] of the loop: the leak exp(-softplus(a)), in (0, 1), and the external
        potential, if any.
        """
        keep = jnp.exp(-jax.nn.softplus(params["core"]["leak"]))
        return keep, params["core"]["drive"] if self.shape.drive else jnp.zeros_like(keep)

    def stages(
        self,
        stages: Any,
        x: Array,
        positions: Array,
        segments: Array | None = None,
        cache: Any = None,
        route: Array | None = None,
    ) -> tuple[Array, Any]:
        """Run stages, in a stack or `apart` (None: no stage), on the stream [B, T, D]: the stream
        and the cache.

        Without a cache (None) stages are a stack, and compiled once.
        """
        if stages is None:
            return x, cache
        stage = Stage(self.shape)

        def body(x: Array, layer: Any) -> tuple[Array, Any]:
            weights, kept = layer
            return stage.apply({"params": gathered(weights)}, x, positions, segments, kept, route)

        if cache is not None:
            after = []
            for layer in zip(
                stages if isinstance(stages, tuple) else unstacked(stages), cache, strict=True
            ):
                x, kept = body(x, layer)
                after.append(kept)
            return x, tuple(after)
        names = () if self.shape.remat == "stages" else KEPT
        body = jax.checkpoint(
            body, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(*names)
        )
        return jax.lax.scan(body, x, (stages, None))

    def stream(
        self,
        params: Params,
        x: Array,
        positions: Array,
        segments: Array | None = None,
        cache: Params | None = None,
        record: bool = False,
    ) -> tuple[Array, Params, Round | None]:
        """All stages on the stream of embedded tokens [B, T, D]: the stream after them, the cache,
        the records.
        """
        s, cache, records, params = self.shape, dict(cache or {}), None, self.expand_shared(params)
        x, cache["prelude"] = self.stages(
            params.get("prelude"), x, positions, segments, cache.get("prelude")
        )
        if s.core:
            keep, drive = self.scales(params)
            x, cache["core"], records = communicate(
                self.update(params, x, positions, segments),
                x,
                keep=keep,
                drive=drive,
                rounds=s.rounds,
                activation=s.state_activation,
                remat=s.remat != "none",
                record=record,
                memory=cache.get("core"),
            )
        x, cache["coda"] = self.stages(
            params.get("coda"), x, positions, segments, cache.get("coda")
        )
        return x, cache, records

    def _restacked(self, params: Params, change: Callable[[Params, slice], Any]) -> Params:
        """Parameters with change(stack, its rows among all stages) in place of each stack of
        stages.
        """
        found = dict(params)
        for name, rows in self.rows().items():
            if name == "core":
                found["core"] = {**params["core"], "stages": change(params["core"]["stages"], rows)}
            else:
                found[name] = change(params[name], rows)
        return found

    def _forward(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segments: Array | None,
        cache: Params | None,
        record: bool,
    ) -> tuple[Array, Params, Round | None]:
        chex.assert_rank([tokens, positions], [2, 1])
        if segments is not None:
            chex.assert_equal_shape([tokens, segments])
        x, cache, records = self.stream(
            params, self._embed(params, tokens), positions, segments, cache, record
        )
        return self._unembed(params, x), cache, records

    def _loop_begins(
        self, params: Params, tokens: Array, segments: Array | None
    ) -> tuple[Params, Array, Array]:
        """Whole parameters, positions [T], and the stream [B, T, D] before the first round."""
        if not self.shape.core:
            raise ValueError("model: has no loop (model.core=0), so there are no rounds to choose")
        params, positions = self.expand_shared(params), jnp.arange(tokens.shape[1])
        x, _ = self.stages(params.get("prelude"), self._embed(params, tokens), positions, segments)
        return params, positions, x

    def _read_out(
        self, params: Params, x: Array, positions: Array, segments: Array | None
    ) -> Array:
        """Logits [B, T, V] of the stream after some round; `params` are `whole`."""
        return self._unembed(params, self.stages(params.get("coda"), x, positions, segments)[0])

    def _embed(self, params: Params, tokens: Array) -> Array:
        return constrain(constrain(params["embed"], None, "group")[tokens], *self.shape.stream_axes)

    def _unembed(self, params: Params, x: Array) -> Array:
        x = constrain(
            jnp.asarray(RMSNorm().apply({"params": params["norm"]}, x)), *self.shape.stream_axes
        )
        return unembed(x, params["unembed"])


def unstacked(stack: Params) -> tuple[Params, ...]:
    """The stages of a stack, each by itself."""
    return tuple(
        jax.tree.map(lambda p, i=i: p[i], stack) for i in range(len(jax.tree.leaves(stack)[0]))
    )
