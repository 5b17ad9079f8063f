"""The decoder: embed, prelude stages, core stages in rounds, coda stages, logits.

For: the order of things and the loops. Not for: what a stage holds (`layers.py`), or how parameters
lie (`stacks.py`). Axes: B batch, T tokens, D width, V vocabulary, R rounds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp

from ngc_jax.core import communicate as loops
from ngc_jax.core.params import ParamInfo
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics.measures import Round
from ngc_jax.nn import stacks
from ngc_jax.nn.layers import KEPT, RMSNorm, Stage
from ngc_jax.nn.mesh import constrain, gathered
from ngc_jax.nn.model import LanguageModel, Maybe, Pair, Params, end_info, init_ends, unembed
from ngc_jax.nn.params import STAGES, combine, describe, drop_states, stacked
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.sharing import spread, take
from ngc_jax.nn.synapse import PAST

Array = jax.Array
Where = tuple[Maybe, Maybe]  # segments [B, T] and positions [T]


@dataclasses.dataclass(frozen=True)
class Decoder(LanguageModel):
    """Functions of one model shape; holds no arrays."""

    shape: ModelShape

    def at(self, rounds: int) -> Self:
        """The same model with another number of rounds; it takes the same parameters."""
        return self.reshaped(rounds=rounds)

    def reshaped(self, **fields: Any) -> Self:
        """The same model, of the same class, with other values of some fields of `shape`."""
        return dataclasses.replace(self, shape=dataclasses.replace(self.shape, **fields))

    def init(self, key: Array) -> Params:
        s, x = self.shape, jnp.zeros((1, 1, self.shape.width))
        embed, prelude, core, coda, unembed = jax.random.split(key, 5)
        # All stages at once: a program that draws each stack by itself compiles 3 times as long.
        counts = ((prelude, s.prelude), (core, s.core), (coda, s.coda))
        keys = jnp.concatenate([jax.random.split(k, count) for k, count in counts])
        rest = self.init_ends(embed, unembed)
        if s.apart:
            drawn = [self.stage(i).init(k, x, jnp.arange(1))["params"] for i, k in enumerate(keys)]
            return rest | {"prelude": stacks.numbered(drawn)}
        stages = jax.vmap(lambda k: Stage(s).init(k, x, jnp.arange(1))["params"])(keys)
        if s.core:
            # keep + drive = 1 at start: where core(x) is small, the loop rests at its input.
            rest["core"] = {"leak": jnp.full(s.width, jnp.log(jnp.expm1(-jnp.log(s.keep))))}
            rest["core"] |= {"drive": jnp.full(s.width, 1 - s.keep)} if s.drive else {}
        return stacks.arrange(s, stages, self.stage_info, rest, take)

    def init_ends(self, embed: Array, unembed: Array) -> Params:
        """What there is beside the stages, "embed", "norm" and "unembed", from two keys."""
        return init_ends(self.shape, embed, unembed)

    def end_info(self) -> Params:
        """The records of "embed" and "unembed"."""
        return end_info(self.shape.tied)

    def param_info(self) -> Params:
        s, scale = self.shape, ParamInfo("scale", (None,))
        rest: Params = {"norm": {"scale": scale}, **self.end_info()}
        if s.core:
            rest["core"] = {"leak": scale, **({"drive": scale} if s.drive else {})}
        if s.apart:
            return rest | {"prelude": stacks.numbered(self._info)}
        stages = stacked(self.stage_info, "stage")
        return stacks.arrange(s, stages, self.stage_info, rest, lambda tree, rows: tree)

    @property
    def stage_info(self) -> Params:
        """The records of one stage's parameters, where all are alike."""
        return self._info[0]

    @functools.cached_property
    def _info(self) -> list[Params]:
        """The records of each stage that differs in shape from others, or of one."""
        x, at = jnp.zeros((1, 1, self.shape.width)), jnp.arange(1)
        return [describe(self.stage(i), x, at) for i in range(len(self.shape.apart) or 1)]

    def stage(self, number: int) -> Stage:
        """The layer of a stage, counted from 0 in its stack."""
        return Stage(self.shape, number)

    def unembed(self, params: Params, x: Array) -> Array:
        """Logits [B, T, V] in float32 of the stream [B, T, D] after the last stage."""
        s = self.shape
        x = jnp.asarray(RMSNorm(epsilon=s.norm_epsilon).apply({"params": params["norm"]}, x))
        return unembed(constrain(self.read(x), *s.stream_axes), params)

    def read(self, x: Array) -> Array:
        """What logits are made of, of the last norm's [B, T, D]: here all."""
        return x

    def apply(self, params: Params, batch: Batch, record: bool = False) -> Pair:
        """Logits [B, T, V] in float32, and the rounds' stability records [R] if asked for."""
        x = self.embed(params, batch)
        x, _, records = self.stream(params, x, batch.segments, record=record)
        return self.unembed(params, x), records

    def dropped(self, params: Params, key: Array) -> Params:
        s = self.shape
        params = drop_states(params, self.param_info(), s.state_dropout, key)
        if not (s.dropout or s.stochastic_depth):
            return params
        keys = jax.random.split(jax.random.fold_in(key, STAGES), s.prelude + s.core + s.coda)
        # In each round of a loop the same (arXiv 1512.05287).
        return stacks.restack(s, params, lambda stack, rows: stacks.keyed(stack, keys[rows]))

    def iterate(
        self, params: Params, batch: Batch, *, rounds: Array, most: int | None = None, **how: Any
    ) -> tuple[Array, Array]:
        """`apply` for a number of rounds that is an array, [] or [B] int32, and at most `most`.

        how: `backprop` (0), `every`, `disturb` of `communicate_per_example`. Returns logits [S, B,
        T, V] and the rounds [S, B] made there. Raises ValueError for a model without a loop.
        """
        params, x = self.loop_start(params, self.embed(params, batch), batch.segments)
        how = {"backprop": 0, "still": None, "remat": self.shape.remat != "none", **how}
        if most != how["backprop"]:
            how["still"] = self.turn(*jax.lax.stop_gradient((params, x)), batch.segments)
        turn, rounds = self.turn(params, x, batch.segments), jnp.broadcast_to(rounds, x.shape[:1])
        states, made = loops.communicate_per_example(turn, x, rounds, **how)
        # One after another, so that the coda is compiled once.
        return jax.lax.map(lambda x: self._read_out(params, x, batch.segments), states), made

    def settle(self, params: Params, batch: Batch, *, tolerance: Array | float, cap: int) -> Pair:
        """Logits after `communicate_until_settled`, and the rounds of each token [B, T]."""
        params, x = self.loop_start(params, self.embed(params, batch), batch.segments)
        turn = self.turn(params, x, batch.segments)
        x, rounds = loops.communicate_until_settled(turn, x, tolerance, cap)
        return self._read_out(params, x, batch.segments), rounds

    def decode(
        self, params: Params, tokens: Array, cache: Params, position: Array, last: bool = False
    ) -> Pair:
        # For a few tokens reading takes longest, and states are less than weights.
        sparing = self.reshaped(form="weights" if self.shape.rule == "dense" else "signals")
        return LanguageModel.decode(sparing, params, tokens, cache, position, last)

    def forward(
        self, params: Params, x: Array, at: Array, segments: Maybe, cache: Any, last: bool = False
    ) -> Pair:
        x, cache, _ = self.stream(params, x, segments, past=(at, cache or {}))
        return self.unembed(params, x[:, -1:] if last else x), cache

    def unstack(self, params: Params) -> Params:
        # A loop over a stack would copy each stage before it is read.
        params = self.expand_shared(params)
        return stacks.restack(self.shape, params, lambda stack, rows: stacks.stages_of(stack))

    def expand_shared(self, params: Params) -> Params:
        """Parameters in which each stage has send states of its own."""
        if "senders" not in params:
            return params
        own, s = dict(params), self.shape
        shared = spread(s.shared.stages, own.pop("senders"))
        return stacks.restack(s, own, lambda stack, rows: combine(stack, take(shared, rows)))

    def init_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> Params:
        """A key-value cache, of each stage apart, rounds in front; ValueError if not causal.

        Under `delays`, with what each synapse said at the last tokens, as far as it will be heard.
        """
        s = self.shape
        if not s.causal:
            raise ValueError("causal=False: such a model reads all at once, and has no cache")

        def caches(stages: int, *leading: int) -> tuple[Params, ...]:
            shape = (*leading, batch, length, s.kv_heads or s.heads, s.head_size)
            zeros = functools.partial(jnp.zeros, dtype=dtype)  # each apart: a step may donate them

            told = self._past(batch, route=bool(leading) and s.route == "start")

            def empty() -> Params:
                past = jax.tree.map(lambda said: zeros((*leading, *said.shape)), told)
                return {"key": zeros(shape), "value": zeros(shape)} | past

            return tuple(empty() for _ in range(stages))

        core = caches(s.core, s.rounds)
        return {"prelude": caches(s.prelude), "core": core, "coda": caches(s.coda)}

    def _past(self, batch: int, route: bool) -> Params:
        """The shapes of what a stage's synapses remember: {PAST: ...}; {} without `delays`."""
        if not self.shape.delays:
            return {}
        x, at, key = jnp.zeros((batch, 1, self.shape.width)), jnp.arange(1), jax.random.key(0)
        given = x, at, None, None, x if route else None
        made = jax.eval_shape(lambda: self.stage(0).init(key, *given))
        return {name: shapes for name, shapes in made.items() if name == PAST}

    def generated(self) -> dict[str, dict[str, int]]:
        s = self.shape
        if s.rule == "dense" or s.apart:  # whose weights are never formed
            return {}
        square, tall = s.width * s.width, s.width * s.hidden
        stage = {"query_key_value": 3 * square, "attention_out": square}
        stage |= {"gate_up": 2 * tall, "down": tall}
        runs = {"prelude": s.prelude, "core": s.core * s.rounds, "coda": s.coda}
        return {name: {k: n * times for k, n in stage.items()} for name, times in runs.items()}

    def loop_start(self, params: Params, x: Array, segments: Maybe) -> tuple[Params, Array]:
        """Expanded parameters and the stream before the loop; ValueError where there is none."""
        if not self.shape.core:
            raise ValueError("model: has no loop (model.core=0), so there are no rounds to choose")
        params = self.expand_shared(params)
        return params, self.stages(params, "prelude", x, (segments, None), None)[0]

    def update(
        self, params: Params, start: Array, segments: Maybe = None, at: Maybe = None
    ) -> Callable[[Array, Any], Pair]:
        """What a round adds, update(x, cache) -> (core(x), cache), in the loop begun at `start`."""

        def update(x: Array, memory: Any) -> Pair:
            route = self.route(start)
            after, memory = self.stages(params, "core", x, (segments, at), memory, route)
            return after - x, memory

        return update

    def turn(self, params: Params, start: Array, segments: Maybe = None) -> loops.Turn:
        """One round, x -> phi(keep x + drive e + core(x)), e = `start`; `params` are expanded."""
        keep, drive = self.scales(params)
        update, phi = self.update(params, start, segments), self.shape.state_activation
        return lambda x: loops.advance(x, update(x, None)[0], drive * start, keep, phi)

    def route(self, start: Array) -> Maybe:
        """What queries and keys are read from in the loop begun at `start`; None: the state."""
        return start if self.shape.route == "start" else None

    def scales(self, params: Params) -> tuple[Array, Array]:
        """keep and drive [D]: the leak exp(-softplus(a)), in (0, 1), and the external potential."""
        keep = jnp.exp(-jax.nn.softplus(params["core"]["leak"]))
        return keep, params["core"]["drive"] if self.shape.drive else jnp.zeros_like(keep)

    def stages(
        self, params: Params, name: str, x: Array, where: Where, cache: Any, route: Maybe = None
    ) -> Pair:
        """Run a stack of expanded `params` on x [B, T, D]: the stream after it and the cache."""
        stages, (segments, at) = stacks.get_stack(params, name), where
        if stages is None:
            return x, cache
        at = self.shape.positions(x.shape[1]) if at is None else at
        if segments is not None:
            chex.assert_shape(segments, x.shape[:2])

        def body(x: Array, layer: Any, number: int = 0) -> Pair:
            return self.run_stage(number, layer[0], x, (segments, at), layer[1], route)

        if cache is None and not self.shape.apart:
            body = jax.checkpoint(body, prevent_cse=False, policy=self.kept)
            return jax.lax.scan(body, x, (stages, None), unroll=self.written_out)
        apart = stages if isinstance(stages, tuple) else stacks.stages_of(stages)
        after = []
        for number, layer in enumerate(zip(apart, cache or [None] * len(apart), strict=True)):
            run: Any = functools.partial(body, number=number)
            run = run if cache is not None else jax.checkpoint(run, policy=self.kept)
            x, kept = run(x, layer)
            after.append(kept)
        return x, None if cache is None else tuple(after)

    def run_stage(
        self, number: int, weights: Params, x: Array, where: Where, cache: Any, route: Maybe = None
    ) -> Pair:
        """Run a stage, counted from 0 in its stack, on x [B, T, D]: the stream and the cache."""
        weights, rngs = stacks.unkeyed(weights)
        weights = gathered(weights, lambda: self._info[number if self.shape.apart else 0])
        segments, at = where
        run = functools.partial(self.stage(number).apply, rngs=rngs)
        if cache is None or PAST not in cache:
            return run({"params": weights}, x, at, segments, cache, route)
        own = {name: kept for name, kept in cache.items() if name != PAST}
        variables = {"params": weights, PAST: cache[PAST]}
        (x, own), past = run(variables, x, at, segments, own, route, mutable=[PAST])
        return x, own | past

    @property
    def written_out(self) -> int:
        """How many stages of a stack are written out in its loop: a CPU would copy what it keeps.

        That may take more memory, which remat="stages" spares.
        """
        return 4 if jax.default_backend() == "cpu" and self.shape.remat != "stages" else 1

    @property
    def kept(self) -> Callable[..., bool]:
        """What `jax.checkpoint` of a stage keeps for the gradient, as `shape.remat` says."""
        names = () if self.shape.remat == "stages" else KEPT
        return jax.checkpoint_policies.save_only_these_names(*names)

    def stream(
        self, params: Params, x: Array, segments: Maybe = None, record: bool = False, past: Any = ()
    ) -> tuple[Array, Params, Round | None]:
        """All stages on the embedded stream [B, T, D]: the stream, the cache, the records.

        segments [B, T], if given, number the documents; `past`: positions [T] and the cache.
        """
        at, cache = past or (None, {})
        s, kept, records, params = self.shape, dict(cache), None, self.expand_shared(params)
        x, kept["prelude"] = self.stages(params, "prelude", x, (segments, at), kept.get("prelude"))
        if s.core:
            how: Params = {"rounds": s.rounds, "remat": s.remat != "none", "record": record}
            how |= {"activation": s.state_activation, "memory": kept.get("core")}
            update = self.update(params, x, segments, at)
            x, kept["core"], records = loops.communicate(update, x, *self.scales(params), **how)
        x, kept["coda"] = self.stages(params, "coda", x, (segments, at), kept.get("coda"))
        return x, kept, records

    def _read_out(self, params: Params, x: Array, segments: Maybe) -> Array:
        """Logits [B, T, V] of the stream after a round; `params` are expanded."""
        return self.unembed(params, self.stages(params, "coda", x, (segments, None), None)[0])
