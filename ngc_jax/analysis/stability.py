"""All that the stability page shows of a trained model, measured on some held-out windows.

For: the measures over sequences, and headline numbers. Not for: pictures (`figures.py`) or words.
Axes: B sequences, T tokens, D width, G groups, R rounds of training, K followed, k exponents.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.analysis import bounds, probes
from ngc_jax.core.rules import Rule, States
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics import lyapunov, measures
from ngc_jax.nn import sharing, stacks
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.shape import ModelShape
from ngc_jax.nn.synapse import SynapsePart
from ngc_jax.runtime.output import doing

Array = jax.Array
Params = dict[str, Any]
Part = tuple[Rule, States, States]  # a summand of a synapse: its rule, pre, post
EXPONENTS = 8  # of each spectrum
RESOLVED = 1e-5  # of the state's length: a smaller step is rounding error in float32


class Loop(NamedTuple):
    """What the communication loop does, by sequence."""

    trained: int  # R
    followed: int  # K, at least R
    dropped: int  # of K, before exponents are counted
    start: np.ndarray  # [B, k] exponents over the R rounds of training, per round
    exponents: np.ndarray  # [B, k] exponents over rounds dropped + 1 to K, per round
    dimension: np.ndarray  # [B] Kaplan-Yorke dimension of `exponents`
    entropy: np.ndarray  # [B] nats per round
    contraction: np.ndarray  # [B, K - 1, T] factor of steps; nan where one is rounding error
    drive_ratio: np.ndarray  # [B, R, T] in [0, 1]
    boundedness: np.ndarray  # [B, T] over the R rounds of training
    bounded_on: np.ndarray  # [B, T] over all K
    path: np.ndarray  # [K + 1, T, D] states of the first sequence


class Measured(NamedTuple):
    """All measures of one model; None, or empty, where it has no such part."""

    tokens: np.ndarray  # [B, T]
    loop: Loop | None
    depth: np.ndarray  # [B, k] exponents from the embedding to the last stage, per stage
    along: np.ndarray  # [B, k] exponents along tokens, per token
    moves: np.ndarray  # [B, T - 1] `token_moves` of the last stream
    settling: np.ndarray  # [B] slope of `moves`, per token
    departures: dict[str, np.ndarray]  # "messages", "drive" -> [B, T] of the last stream
    traffic: dict[str, np.ndarray]  # stage -> [G listeners, G speakers]
    bounds: dict[str, dict[str, float]]  # stage -> synapse -> most that it stretches a difference


class Headline(NamedTuple):
    """One number of a model: the mean over sequences, and its 95% interval."""

    kind: str  # "exponent", "contraction", ...
    where: str  # along what, over which rounds, or with what off
    mean: float
    low: float
    high: float
    unit: str


def measure(model: Decoder, params: Params, batch: Batch, rounds: int) -> Measured:
    """Measures on B >= 2, T >= 4, over two rounds or more (for a ratio), and those of training."""
    k = min(EXPONENTS, model.shape.width)
    # A program for each: two calls of LAPACK in one can wait for each other for ever on XLA:CPU.
    return Measured(
        depth=_each(partial(probes.depth_exponents, model, k=k), params, batch)[:, 0],
        along=_each(partial(probes.token_exponents, model, k=k), params, batch)[:, 0],
        tokens=np.asarray(batch.inputs),
        loop=_loop(model, params, batch, rounds) if model.shape.core else None,
        traffic=_traffic(model, params, batch) if model.shape.has_messages else {},
        bounds={} if model.shape.message_activation else gain_bounds(model, params),
        **_each(partial(_streams, model), params, batch),
    )


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over sequences of values [B, ...] and its 95% interval: mean, low, high, each [...]."""
    low, high = jax.jit(lyapunov.bootstrap_interval)(jnp.asarray(values, jnp.float32))
    return np.mean(values, axis=0), np.asarray(low), np.asarray(high)


def headlines(measured: Measured) -> list[Headline]:
    """The numbers at the top of the page, those of the loop first."""
    loop, size = measured.loop, "times the size at the start"
    rows = [
        ("exponent", "along depth", measured.depth[:, 0], "per stage"),
        ("exponent", "along tokens", measured.along[:, 0], "per token"),
    ]
    if loop is not None:
        several = f"the {loop.trained} rounds of training"
        trained = several if loop.trained > 1 else "the one round of training"
        whole = f"rounds 1 to {loop.followed}"
        along = f"along rounds, rounds {loop.dropped + 1} to {loop.followed}"
        steps, unit = loop.contraction[:, : loop.trained - 1], "factor per round"
        early = [("contraction", trained, settled(steps), unit)] if loop.trained > 1 else []
        rows = [
            ("exponent", f"along rounds, {trained}", loop.start[:, 0], "per round"),
            ("exponent", along, loop.exponents[:, 0], "per round"),
            *rows,
            *early,
            ("contraction", whole, settled(loop.contraction), unit),
            ("drive ratio", trained, loop.drive_ratio.mean((1, 2)), "share, per round"),
            ("boundedness", trained, loop.boundedness.mean(1), size),
            ("boundedness", whole, loop.bounded_on.mean(1), size),
        ]
    for what, values in measured.departures.items():
        unit = "times the size of the state without"
        rows.append(("departure", f"{what} off", values.mean(1), unit))
    rows.append(("token contraction", "last stage", measured.settling, "per token"))
    if loop is not None:
        of = f"directions, of {loop.exponents.shape[1]} measured"
        rows.append(("Kaplan-Yorke dimension", along, loop.dimension, of))
        rows.append(("entropy rate", along, loop.entropy, "nats per round"))
    mean, low, high = interval(np.stack([values for _, _, values, _ in rows], axis=1))
    return [
        Headline(kind, where, float(mean[i]), float(low[i]), float(high[i]), unit)
        for i, (kind, where, _, unit) in enumerate(rows)
    ]


def settled(ratios: np.ndarray) -> np.ndarray:
    """Geometric mean of contraction [B, rounds, T], without rounding error: [B]."""
    logs = np.ma.masked_invalid(np.log(np.maximum(ratios, measures.TINY)))
    return np.exp(logs.mean(axis=(1, 2)).filled(np.nan))


def _each(one: Callable[[Params, Batch], Any], params: Params, batch: Batch) -> Any:
    """one(params, batch of one row) for each row in turn: [B, ...] arrays, memory that of one."""

    def rows(params: Params, batch: Batch) -> Any:
        single = lambda row: jax.tree.map(lambda a: a[None], row)  # noqa: E731
        return jax.lax.map(lambda row: one(params, single(row)), batch)

    what = getattr(one, "func", one).__name__.strip("_").replace("_", " ")
    with doing(f"measuring {what}"):
        return jax.tree.map(np.asarray, jax.jit(rows)(params, jax.tree.map(jnp.asarray, batch)))


def _streams(model: Decoder, params: Params, row: Batch) -> dict[str, Any]:
    """What the last stream of one row is like, and how far it is from that with parts off."""

    def last(params: Params) -> Array:
        return model.stream(params, model.embed(params, row), row.segments)[0][0]

    state, off = last(params), {}
    for part in probes.parts_to_silence(model.shape):
        off[part] = measures.departure(state, last(probes.silenced(model, params, part)))
    moves, settling = measures.token_moves(state), measures.token_contraction(state)
    return {"moves": moves, "settling": settling, "departures": off}


def _loop(model: Decoder, params: Params, batch: Batch, rounds: int) -> Loop:
    trained, followed = model.shape.rounds, max(rounds, model.shape.rounds)
    dropped = followed // 4
    exponents = partial(probes.round_exponents, model, k=min(EXPONENTS, model.shape.width))
    later = partial(exponents, rounds=followed - dropped, transient=dropped)
    spectrum = _each(later, params, batch)[:, 0]

    def contraction(params: Params, row: Batch) -> dict[str, Array]:
        states = probes.round_states(model, params, row, followed)[:, 0]
        _, drive = model.scales(params)
        core = model.update(model.expand_shared(params), states[:1], row.segments)
        update = jax.vmap(lambda x: core(x[None], None)[0][0])(states[:-1])
        step = measures.norm(jnp.diff(states, axis=0))
        resolved = jnp.minimum(step[1:], step[:-1]) > RESOLVED * measures.norm(states[2:])
        return {
            "contraction": jnp.where(resolved, measures.contraction(states), jnp.nan),
            "drive_ratio": measures.drive_ratio(drive * states[0], update)[:trained],
            "boundedness": measures.boundedness(states[: trained + 1]),
            "bounded_on": measures.boundedness(states),
        }

    path = jax.jit(lambda params, row: probes.round_states(model, params, row, followed)[:, 0])
    first = jax.tree.map(lambda a: jnp.asarray(a[:1]), batch)
    return Loop(
        trained=trained,
        followed=followed,
        dropped=dropped,
        start=_each(partial(exponents, rounds=trained), params, batch)[:, 0],
        exponents=spectrum,
        dimension=np.asarray(jax.jit(jax.vmap(lyapunov.kaplan_yorke_dimension))(spectrum)),
        entropy=np.asarray(jax.jit(jax.vmap(lyapunov.entropy_rate))(spectrum)),
        path=np.asarray(path(params, first)),
        **_each(contraction, params, batch),
    )


def _traffic(model: Decoder, params: Params, batch: Batch) -> dict[str, np.ndarray]:
    loud = _each(partial(probes.traffic, model), params, batch)
    # jit returns a dict in the order of its keys, "coda 1" first: put stages in a token's order.
    stages = probes.stage_names(model.shape)
    return {stage: np.sqrt(np.mean(np.square(loud[stage]), axis=0)) for stage in stages}


def gain_bounds(model: Decoder, params: Params) -> dict[str, dict[str, float]]:
    """The most that synapses of linear messages stretch a difference: {stage: {synapse: most}}."""
    found = of_synapses(model, params, bounds.gain_bound)
    return {stage: {name: float(x) for name, x in of.items()} for stage, of in found.items()}


def of_synapses(
    model: Decoder, params: Params, measure: Callable[[list[Part]], Array]
) -> dict[str, dict[str, np.ndarray]]:
    """measure(parts summed in W) of each synapse, {"prelude 1": {"query": array, ...}, ...}."""
    shape, params = model.shape, model.expand_shared(params)

    def stage(parts: Any, senders: tuple[int, ...], states: dict[str, Params]) -> Array:
        def member(pre: Params, post: Params) -> Array:
            sides = ((one, pre[one.name], post[one.name]) for one in parts)
            return measure([alone for side in sides for alone in _by_delay(*side, states)])

        own = {one.name: states[one.name] for one in parts}
        pre = {name: sharing.spread(senders, part.get("pre", ())) for name, part in own.items()}
        post = {name: part.get("post", part.get("weight")) for name, part in own.items()}
        return jax.vmap(member)(pre, post)

    @partial(jax.jit, static_argnums=(0, 1))
    def run(parts: Any, senders: tuple[int, ...], states: Params) -> Array:
        return jax.vmap(partial(stage, parts, senders))(states)

    found: dict[str, dict[str, np.ndarray]] = {}
    for name in stacks.stack_rows(shape):
        stack = stacks.get_stack(params, name)
        alone = [jax.tree.map(lambda a: a[None], one) for one in stacks.stages_of(stack)]
        for number, states in enumerate(alone if shape.apart else [stack]):
            for synapse, members in shape.fans(number).items():
                joined = shape.apart and ["+".join(members)]  # of one set of states
                senders = (0,) if joined else _senders(shape, synapse, len(members))
                parts = shape.summands(number)[synapse]
                for i, measured in enumerate(np.asarray(run(parts, senders, states[synapse]))):
                    of = found.setdefault(f"{name} {number + i + 1}", {})
                    of |= zip(joined or members, measured, strict=True)
    return found


def _by_delay(part: SynapsePart, pre: Any, post: Any, states: Params) -> list[Part]:
    """A part as one for each delay, which make W together: to late ears differences may add up."""
    if not part.delays.tokens:
        return [(part.how, pre, post)]
    fixed = part.delays.kernel((post if part.place == "dense" else pre).shape[-1])
    kernel = states.get(part.taps, fixed[fixed.any(axis=1)])
    if part.place == "dense":
        return [(part.how, pre, post * share) for share in kernel]
    return [(part.how, pre * share, post) for share in kernel]


def _senders(shape: ModelShape, synapse: str, count: int) -> tuple[int, ...]:
    """Whose send states each member of a synapse has."""
    return shape.shared.of(synapse) if synapse in sharing.FANS else tuple(range(count))
