"""Our models as dynamical systems: a step along rounds, depth and tokens, and its exponents.

For: a decoder on a batch as a map for `dynamics/lyapunov.py`; parts switched off; messages and
attention. Not for: the kernels, or what training logs (`training/stability_metrics.py`).
Axes: B sequences, T tokens, D width, G groups, K rounds followed, k exponents.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.communicate import advance
from ngc_jax.core.delays import late
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules import GATES, RULES, SignalRule, States, signal_rule, transmit
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics.lyapunov import lyapunov_spectrum, orthonormalise, push_forward
from ngc_jax.dynamics.measures import slope
from ngc_jax.nn import layers, sharing, stacks
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.synapse import Heard, intercept

Array = jax.Array
Params = dict[str, Any]
Step = Callable[[Any, Any], Any]
Visit = Callable[[Callable[..., Any], Array, Array | None], tuple[Array, Any]]
After = Callable[[int, Array], None]


def rounds_step(model: Decoder, params: Params, batch: Batch) -> tuple[Step, Array]:
    """The loop as (step, x_0): step(x, None) is a round, x_0 = e [B, T, D]. ValueError: no loop."""
    params, start = model.loop_start(params, model.embed(params, batch), batch.segments)
    turn = model.turn(params, start, batch.segments)
    return (lambda x, u: turn(x)), start


def round_states(model: Decoder, params: Params, batch: Batch, rounds: int) -> Array:
    """The stream after 0, 1, ..., `rounds` rounds, as many as are asked for: [K + 1, B, T, D]."""
    step, start = rounds_step(model, params, batch)

    def go_on(x: Array, _: None) -> tuple[Array, Array]:
        after = step(x, None)
        return after, after

    return jnp.concatenate([start[None], jax.lax.scan(go_on, start, length=rounds)[1]])


def round_exponents(
    model: Decoder, params: Params, batch: Batch, *, rounds: int, transient: int = 0, k: int = 1
) -> Array:
    """The k largest exponents of the loop per round, by sequence, over any `rounds`: [B, k]."""

    def one(row: Batch) -> Array:
        step, start = rounds_step(model, params, row)
        return lyapunov_spectrum(step, start, steps=rounds, transient=transient, k=k)

    return _each_row(one, batch)


def depth_exponents(model: Decoder, params: Params, batch: Batch, *, k: int = 1) -> Array:
    """The k largest finite-time exponents from embedding to last stage, per stage: [B, k].

    No long-run limit: log of the k largest stretches of tangents [T, D] on the way, over the number
    of stages, those of each round counted. The drive is an input of the loop and held.
    """
    params, s = model.expand_shared(params), model.shape

    def follow(step: Step, carry: tuple[Array, Array, Array], inputs: Any) -> Any:
        def body(carry: Any, u: Any) -> tuple[Any, None]:
            x, tangents, total = carry
            after, pushed = push_forward(lambda x: step(x, u), x, tangents)
            rows, growth = orthonormalise(pushed.reshape(pushed.shape[0], -1))
            return (after, rows.reshape(pushed.shape), total + growth), None

        return jax.lax.scan(body, carry, inputs)[0]

    def one(row: Batch) -> Array:
        def stages(carry: tuple[Array, Array, Array], name: str) -> Any:
            stack = stacks.get_stack(params, name)
            if not s.apart:
                return follow(lambda x, one: run_stage(s, 0, one, row, x)[0], carry, stack)
            for number, weights in enumerate(stacks.stages_of(stack)):
                run = partial(run_stage, s, number, weights, row)
                carry = follow(partial(lambda run, x, _: run(x)[0], run), carry, jnp.zeros(1))
            return carry

        x = model.embed(params, row)
        tangents, _ = orthonormalise(jax.random.normal(jax.random.key(0), (k, x.size)))
        carry = (x, tangents.reshape(k, *x.shape), jnp.zeros(k))
        if s.prelude:
            carry = stages(carry, "prelude")
        if s.core:
            turn = model.turn(params, carry[0], row.segments)
            carry = follow(lambda x, _: turn(x), carry, jnp.arange(s.rounds))
        if s.coda:
            carry = stages(carry, "coda")
        return -jnp.sort(-carry[2] / s.depth)

    return _each_row(one, batch)


def run_stage(
    shape: ModelShape,
    number: int,
    weights: Params,
    batch: Batch,
    x: Array,
    route: Any = None,
    **how: Any,
) -> Any:
    """What the module of a stage, counted in its stack, returns for a stream at its positions."""
    stage, at = layers.Stage(shape, number), shape.positions(x.shape[1])
    return stage.apply({"params": weights}, x, at, batch.segments, route=route, **how)


def _each_row(one: Callable[[Batch], Array], batch: Batch) -> Array:
    """one(batch of one row) for each row, vectorised."""
    return jax.vmap(lambda row: one(jax.tree.map(lambda a: a[None], row)))(batch)


def token_exponents(
    model: Decoder, params: Params, batch: Batch, *, k: int = 1, source: int = 0
) -> Array:
    """How fast a change of one token's embedding fades from the tokens after it: [B, k], per token.

    Slopes over later tokens t of its document of the log singular values, descending, of the last
    stream's derivative at t by k directions of the embedding at `source`. ValueError: < 3 later.
    """

    def one(row: Batch) -> Array:
        x = model.embed(params, row)
        if not 0 <= source <= x.shape[1] - 4:
            raise ValueError(f"source={source}: must leave 3 tokens after it, of {x.shape[1]}")
        directions, _ = orthonormalise(jax.random.normal(jax.random.key(0), (k, x.shape[-1])))

        def respond(direction: Array) -> Array:
            change = jnp.zeros_like(x).at[0, source].set(direction)
            last = lambda x: model.stream(params, x, row.segments)[0]  # noqa: E731
            return jax.jvp(last, (x,), (change,))[1][0]

        moved = jax.vmap(respond)(directions)[:, source + 1 :]  # [k, lag, D]
        square = jnp.linalg.eigvalsh(jnp.einsum("ktd,ltd->tkl", moved, moved))[:, ::-1]
        at = row.segments  # tokens of other documents do not hear
        hears = None if at is None else at[0, source + 1 :] == at[0, source]
        return slope(0.5 * jnp.log(jnp.maximum(square, 1e-30)).T, hears)

    return _each_row(one, batch)


def parts_to_silence(shape: ModelShape) -> list[str]:
    """What `silenced` can do without in a model."""
    return ["messages"] * shape.has_messages + ["drive"] * (shape.core > 0 and shape.drive)


def silenced(model: Decoder, params: Params, what: str) -> Params:
    """The parameters with nothing sent between groups ("messages"), or no "drive"; ValueError."""
    able = parts_to_silence(model.shape)
    if what not in able:
        there = " or ".join(map(repr, able)) or "nothing"
        raise ValueError(f"what={what!r}: this model can silence {there}")
    if what == "drive":
        core = params["core"]
        return {**params, "core": core | {"drive": jnp.zeros_like(core["drive"])}}

    def still(leaf: Array, info: ParamInfo) -> Array:
        return jnp.zeros_like(leaf) if info.part == "inter" and info.side == "post" else leaf

    return jax.tree.map(still, params, model.param_info())


def silenced_channels(
    model: Decoder, params: Params, groups: Collection[int], channels: Collection[tuple[int, int]]
) -> Params:
    """Parameters under which `groups` send nothing to others, and `channels` carry nothing.

    channels: pairs (listener, speaker), under rule "addressed" with a fixed wiring. Under another
    signal rule only groups, which then do not hear themselves either. ValueError: cannot be.
    """
    s = model.shape
    for group in {*groups, *(g for pair in channels for g in pair)}:
        if not 0 <= group < s.groups:
            raise ValueError(f"group {group}: the model has groups 0 to {s.groups - 1}")
    if s.rule == "addressed" and s.rewirable is None:
        pairs = {*channels, *((g, h) for h in groups for g in range(s.groups) if g != h)}
        table = getattr(s.wired, "wiring", None) or (tuple(range(s.groups)),) * s.groups
        heard = np.array([[(g, h) not in pairs for h in row] for g, row in enumerate(table)])
        side, loud = "post", heard[:, None, :, None]  # [G listeners, m, slots, p]
    elif channels or not isinstance(RULES.get(s.rule), SignalRule):
        able = "rule='addressed' under a fixed wiring" if channels else "a rule that sends signals"
        raise ValueError(f"rule={s.rule!r}, wiring={s.wiring!r}: silencing wants {able}")
    else:
        side, loud = "pre", np.array([g not in groups for g in range(s.groups)])

    def still(leaf: Array, info: ParamInfo) -> Array:
        if info.part != "inter" or info.side != side or info.matrix is None:
            return leaf
        if side == "post":
            return leaf * jnp.asarray(loud, leaf.dtype)
        axis = info.axes.index("group" if "group" in info.axes else "channel")
        mask = np.repeat(loud, leaf.shape[axis] // s.groups)
        return leaf * mask.reshape(-1, *(1,) * (leaf.ndim - axis - 1)).astype(leaf.dtype)

    return jax.tree.map(still, params, model.param_info())


def traffic(model: Decoder, params: Params, batch: Batch) -> dict[str, Array]:
    """How loudly each group speaks to each other one, {"core 1, round 2": [listeners, speakers]}.

    Root mean square of messages over tokens, listeners' neurons and synapses. ValueError: none.
    """
    s = model.shape
    if not s.has_messages:
        raise ValueError(f"model.rule={s.rule!r}: its groups send no messages")

    def visit(run: Callable[..., Any], x: Array, route: Array | None) -> tuple[Array, Array]:
        heard: dict[str, list[tuple[int, Array]]] = defaultdict(list)

        def listen(one: Heard) -> None:
            heard[str(one.synapse.name)].append((len(one.members), _loudness(one, s.groups)))

        with intercept(listen):
            x = run(x, route)[0]
        # The mean over synapses, each the mean over its members.
        means = [sum(n * loud for n, loud in of) / sum(n for n, _ in of) for of in heard.values()]
        return x, jnp.sqrt(jnp.mean(jnp.stack(means), axis=0))

    return {name: loud for name, _, loud in walk(model, params, batch, visit)}


def attention_weights_by_stage(model: Decoder, params: Params, batch: Batch) -> dict[str, Array]:
    """How much each token attends to each other, {"core 1, round 2": [B, H heads, T, T keys]}."""

    def visit(run: Callable[..., Any], x: Array, route: Array | None) -> tuple[Array, Array]:
        (x, _), seen = run(x, route, mutable="intermediates")
        return x, seen["intermediates"]["attention"][0]

    return {name: weights for name, _, weights in walk(model, params, batch, visit)}


def activations(model: Decoder, params: Params, batch: Batch) -> OrderedDict[str, Array]:
    """The stream [B, T, D] after "embedding", each stage "core 1, round 2" and each "round 2"."""
    names, found = iter(stage_names(model.shape)), OrderedDict(embedding=model.embed(params, batch))

    def visit(run: Callable[..., Any], x: Array, route: Array | None) -> tuple[Array, None]:
        x = found[next(names)] = run(x, route)[0]
        return x, None

    walk(model, params, batch, visit, lambda turn, x: found.update({f"round {turn}": x}))
    return found


def walk(
    model: Decoder, params: Params, batch: Batch, visit: Visit, after_round: After | None = None
) -> list[tuple[str, int, Any]]:
    """Takes a batch through a decoder one stage at a time, visit(run, x, route) -> (x, found).

    run(x, route) returns what the module of the stage does. Returns, for each stage passed, its
    name, "core 1, round 2", its number among the stored stages, and what was found. `after_round`
    sees the state of round 1, 2, ...
    """
    s, params, names = model.shape, model.expand_shared(params), iter(stage_names(model.shape))
    passed: list[tuple[str, int, Any]] = []
    first = dict(zip(stacks.STACKS, (0, s.prelude, s.prelude + s.core), strict=True))

    def stages(stack: str, x: Array, route: Array | None = None) -> Array:
        found = stacks.get_stack(params, stack)
        for i, weights in enumerate(stacks.stages_of(found) if found is not None else ()):
            x, seen = visit(partial(run_stage, s, i, weights, batch), x, route)
            passed.append((next(names), first[stack] + i, seen))
        return x

    x = stages("prelude", model.embed(params, batch))
    if s.core:
        start, route, (keep, drive) = x, model.route(x), model.scales(params)
        for turn in range(s.rounds):
            after = stages("core", x, route)
            x = advance(x, after - x, drive * start, keep, s.state_activation)
            if after_round:
                after_round(turn + 1, x)
    stages("coda", x)
    return passed


def stage_names(shape: ModelShape) -> list[str]:
    """The names of the stages that a token passes, in order: "core 1, round 2"."""
    rounds = [("core", f", round {turn + 1}") for turn in range(shape.rounds)]
    passed = [("prelude", ""), *rounds, ("coda", "")]
    return [f"{name} {i + 1}{turn}" for name, turn in passed for i in range(getattr(shape, name))]


def _loudness(heard: Heard, groups: int) -> Array:
    """Mean square of what each group hears from each in one call of a synapse: [G, G speakers]."""
    synapse, x = heard.synapse, heard.x
    part = next((part for part in synapse.parts if part.place == "inter"), None)
    if part is None:  # a dense matrix beside synapses of others
        return jnp.zeros((groups, groups))
    states = synapse.variables["params"][part.name]
    tokens = x.reshape(-1, groups, x.shape[-1] // groups)
    # [speaker, token, G, n]: one group speaks, the others are still.
    alone = (jnp.eye(groups)[:, None, :, None] * tokens).reshape(groups, -1, x.shape[-1])

    def at_ears(signals: Array) -> Array:
        if not part.delays.tokens:
            return signals
        kernel = synapse.variables["params"].get(part.taps, part.delays.kernel(part.dim))
        by_token = signals.reshape(groups, *x.shape[:-1], *signals.shape[2:])
        each = jax.vmap(lambda said: late(said, kernel, heard.segments)[0])
        return each(by_token).reshape(signals.shape)

    def one(pre: States, post: States) -> Array:
        if part.activation is None and not part.delays.tokens:
            got = transmit(part.how, alone, pre, post)  # [speaker, token, n_out]
        else:
            rule = signal_rule(part.how)
            signals = rule.send(alone, pre)
            if part.activation is not None:
                signals = signals * GATES[part.activation](jnp.sum(signals, axis=0))
            got = rule.receive(at_ears(signals), post)
        got = got.reshape(*got.shape[:2], groups, -1)
        return jnp.mean(jnp.square(got), axis=(1, 3)).T

    chosen = jnp.array(heard.members)
    both = (sharing.spread(synapse.senders, states["pre"]), states["post"])
    return jnp.mean(jax.vmap(one)(*jax.tree.map(lambda p: p[chosen], both)), axis=0)
