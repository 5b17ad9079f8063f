"""Our models as dynamical systems: what a step is along rounds, along depth and along tokens, and
its exponents.

For: turning a decoder, its parameters and some text into maps for `core/lyapunov.py`, with parts of
it switched off if asked, and into the messages that groups send and what tokens heed. Not for: the
kernels, or what is logged in training (`watch.py`).

Axes: B sequences, T tokens, D width, G groups, K rounds followed, k exponents.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.core.communicate import advance
from ngc_jax.core.rules import GATES, States, signal_rule, transmit
from ngc_jax.dynamics.lyapunov import lyapunov_spectrum, orthonormalise, push_forward
from ngc_jax.dynamics.measures import slope
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.layers import Stage, Synapse, intercept
from ngc_jax.nn.sharing import spread

Array = jax.Array
Params = dict[str, Any]
Step = Callable[[Any, Any], Any]


def rounds_step(model: Decoder, params: Params, tokens: Array) -> tuple[Step, Array]:
    """The communication loop on tokens [B, T]: (step, x_0), with x_0 = e [B, T, D] what the prelude
    made of them.

    step(x, None) is one round, phi(keep x + drive e + core(x)), with e held. Raises ValueError
    where there is no loop.
    """
    if not model.shape.core:
        raise ValueError(
            "model: has no loop (model.core=0); its exponents go along depth or tokens"
        )
    positions, params = jnp.arange(tokens.shape[1]), model.expand_shared(params)
    start, _ = model.stages(params.get("prelude"), params["embed"][tokens], positions)
    turn = model.turn(params, start, positions)
    return (lambda x, u: turn(x)), start


def round_states(model: Decoder, params: Params, tokens: Array, rounds: int) -> Array:
    """The stream after 0, 1, ..., `rounds` rounds, as many as are asked for: [K + 1, B, T, D]."""
    step, start = rounds_step(model, params, tokens)

    def go_on(x: Array, _: None) -> tuple[Array, Array]:
        after = step(x, None)
        return after, after

    return jnp.concatenate([start[None], jax.lax.scan(go_on, start, length=rounds)[1]])


def round_exponents(
    model: Decoder, params: Params, tokens: Array, *, rounds: int, transient: int = 0, k: int = 1
) -> Array:
    """The k largest exponents of the loop for each sequence, per round: [B, k].

    The state is a whole sequence, [T, D], since attention lets a token's change reach the later
    ones. `rounds` may be more than in training, after a `transient`.
    """

    def one(row: Array) -> Array:
        step, start = rounds_step(model, params, row[None])
        return lyapunov_spectrum(step, start, steps=rounds, transient=transient, k=k)

    return jax.vmap(one)(tokens)


def depth_exponents(model: Decoder, params: Params, tokens: Array, *, k: int = 1) -> Array:
    """The k largest finite-time exponents from the embedding to the last stage, for each sequence,
    per stage: [B, k].

    Stages, those of each round counted, differ, so this is no long-run limit but log of the k
    largest stretches along the way of tangents [T, D], divided by the depth. The drive is an input
    of the loop and held.
    """
    positions, params = jnp.arange(tokens.shape[1]), model.expand_shared(params)
    s = model.shape

    def one(row: Array) -> Array:
        def stage(x: Array, weights: Params) -> Array:
            return Stage(s).apply({"params": weights}, x, positions)[0]

        x = params["embed"][row[None]]
        tangents, _ = orthonormalise(jax.random.normal(jax.random.key(0), (k, x.size)))
        carry = (x, tangents.reshape(k, *x.shape), jnp.zeros(k))
        if s.prelude:
            carry = _follow(stage, carry, params["prelude"])
        if s.core:
            turn = model.turn(params, carry[0], positions)
            carry = _follow(lambda x, _: turn(x), carry, jnp.arange(s.rounds))
        if s.coda:
            carry = _follow(stage, carry, params["coda"])
        return -jnp.sort(-carry[2] / s.depth)

    return jax.vmap(one)(tokens)


def _follow(
    step: Step, carry: tuple[Array, Array, Array], inputs: Any
) -> tuple[Array, Array, Array]:
    """Push tangents [k, ...] through step(x, u) for all u; adds their log growth to a total [k]."""

    def body(carry: tuple[Array, Array, Array], u: Any) -> tuple[tuple[Array, Array, Array], None]:
        x, tangents, total = carry
        after, pushed = push_forward(lambda x: step(x, u), x, tangents)
        rows, growth = orthonormalise(pushed.reshape(pushed.shape[0], -1))
        return (after, rows.reshape(pushed.shape), total + growth), None

    return jax.lax.scan(body, carry, inputs)[0]


def token_exponents(
    model: Decoder, params: Params, tokens: Array, *, k: int = 1, source: int = 0
) -> Array:
    """How fast a change of one token's embedding fades from, or grows in, the tokens after it: [B,
    k], per token.

    A decoder carries no state of fixed size from token to token, so this is read from responses:
    with M_t the derivative of the last stream at t by k directions of the embedding at `source`,
    the slopes over the tokens after it of log of M_t's singular values, descending. Raises
    ValueError for fewer than 3 tokens after the source.
    """
    positions = jnp.arange(tokens.shape[1])
    if not 0 <= source <= tokens.shape[1] - 4:
        raise ValueError(f"source={source}: must leave 3 tokens after it, of {tokens.shape[1]}")

    def one(row: Array) -> Array:
        x = params["embed"][row[None]]
        directions, _ = orthonormalise(jax.random.normal(jax.random.key(0), (k, x.shape[-1])))

        def respond(direction: Array) -> Array:
            change = jnp.zeros_like(x).at[0, source].set(direction)
            return jax.jvp(lambda x: model.stream(params, x, positions)[0], (x,), (change,))[1][0]

        moved = jax.vmap(respond)(directions)[:, source + 1 :]  # [k, lag, D]
        square = jnp.linalg.eigvalsh(jnp.einsum("ktd,ltd->tkl", moved, moved))[:, ::-1]
        return slope(0.5 * jnp.log(jnp.maximum(square, 1e-30)).T)

    return jax.vmap(one)(tokens)


def silenced(params: Params, what: str) -> Params:
    """The same parameters with nothing sent between groups ("messages") or no external potential
    ("drive").

    What is silenced adds exactly nothing. Raises ValueError for another word, and where there is
    nothing to silence.
    """
    touched = []

    def still(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [str(getattr(key, "key", key)) for key in path]
        inter = "post" in names and any(name.startswith("inter_") for name in names)
        if {"messages": inter, "drive": names[-1] == "drive"}[what]:
            touched.append(names)
            return jnp.zeros_like(leaf)
        return leaf

    if what not in ("messages", "drive"):
        raise ValueError(f"what={what!r}: must be 'messages' or 'drive'")
    after = jax.tree_util.tree_map_with_path(still, params)
    if not touched:
        raise ValueError(f"what={what!r}: this model has none")
    return after


def traffic(model: Decoder, params: Params, tokens: Array) -> dict[str, Array]:
    """How loudly each group speaks to each other one, by stage: {"core 1, round 2": [G listeners, G
    speakers], ...}.

    Root mean square, over tokens [B, T] and the listeners' neurons, of all that the stage's
    synapses carry from a speaker to a listener by their messages; with a message activation, under
    the gates of the moment. Raises ValueError for a model without messages.
    """
    s, positions = model.shape, jnp.arange(tokens.shape[1])
    if not s.has_messages:
        raise ValueError(f"model.rule={s.rule!r}: its groups send no messages")

    def visit(weights: Params, x: Array, route: Array | None) -> tuple[Array, Array]:
        heard: list[Array] = []
        with intercept(lambda synapse, x, y: heard.append(_loudness(synapse, x, s.groups))):
            x = Stage(s).apply({"params": weights}, x, positions, route=route)[0]
        return x, jnp.sqrt(jnp.mean(jnp.stack(heard), axis=0))

    return {name: loud for name, _, loud in walk(model, params, tokens, visit)}


def attention_weights_by_stage(model: Decoder, params: Params, tokens: Array) -> dict[str, Array]:
    """How much each token heeds each other one, by stage: {"core 1, round 2": [B, H heads, T, T
    heeded], ...}.
    """
    positions = jnp.arange(tokens.shape[1])

    def visit(weights: Params, x: Array, route: Array | None) -> tuple[Array, Array]:
        stage = Stage(model.shape)
        (x, _), seen = stage.apply(
            {"params": weights}, x, positions, route=route, mutable="intermediates"
        )
        return x, seen["intermediates"]["attention"][0]

    return {name: shares for name, _, shares in walk(model, params, tokens, visit)}


def walk(
    model: Decoder,
    params: Params,
    tokens: Array,
    visit: Callable[[Params, Array, Array | None], tuple[Array, Any]],
) -> list[tuple[str, int, Any]]:
    """Take tokens [B, T] through a decoder one stage at a time, visit(weights, x, route) -> (x,
    found), by rounds.

    What was found at each stage, with its name, "core 1, round 2", and its number among the stages
    that are stored.
    """
    s, params = model.shape, model.expand_shared(params)
    passed: list[tuple[str, int, Any]] = []

    def stages(
        name: str, stack: Params, first: int, count: int, x: Array, route: Array | None = None
    ) -> Array:
        for i in range(count):
            x, found = visit(jax.tree.map(lambda p, i=i: p[i], stack), x, route)
            passed.append((name.format(i + 1), first + i, found))
        return x

    x: Array = params["embed"][tokens]
    if s.prelude:
        x = stages("prelude {}", params["prelude"], 0, s.prelude, x)
    if s.core:
        start, route, (keep, drive) = x, model.route(x), model.scales(params)
        for turn in range(s.rounds):
            after = stages(
                f"core {{}}, round {turn + 1}",
                params["core"]["stages"],
                s.prelude,
                s.core,
                x,
                route,
            )
            x = advance(x, after - x, drive * start, keep, s.state_activation)
    if s.coda:
        stages("coda {}", params["coda"], s.prelude + s.core, s.coda, x)
    return passed


def _loudness(synapse: Synapse, x: Array, groups: int) -> Array:
    """Mean square of what each group hears from each in one synapse, over its fan: [G listeners, G
    speakers].
    """
    (part,) = (part for part in synapse.parts if part.place == "inter")
    states = synapse.variables["params"][f"inter_{part.rule}"]
    tokens = x.reshape(-1, groups, x.shape[-1] // groups)
    # [speaker, token, G, n]: one group speaks, the others are still
    alone = jnp.eye(groups)[:, None, :, None] * tokens
    alone = alone.reshape(groups, -1, x.shape[-1])

    def one(pre: States, post: States) -> Array:
        if part.activation is None:
            got = transmit(part.how, alone, pre, post)  # [speaker, token, n_out]
        else:
            rule = signal_rule(part.how)
            signals = rule.send(alone, pre)
            got = rule.receive(signals * GATES[part.activation](jnp.sum(signals, axis=0)), post)
        got = got.reshape(*got.shape[:2], groups, -1)
        return jnp.mean(jnp.square(got), axis=(1, 3)).T

    return jnp.mean(jax.vmap(one)(spread(synapse.senders, states["pre"]), states["post"]), axis=0)
