"""Rewiring a model while it trains: edges between groups given up and tried anew, between two
updates.

For: `model.wiring="dynamic"` and "dynamic_ports", as `config.rewire` asks. Not for: what an edge is
worth and which are chosen (`core/rewiring.py`), or when `train.py` calls this.

Every synapse has a wiring of its own, one for all that share its send states. All is done in one
layout: each listener has a slot for every edge that there could be, [..., G, n, E, p], where an
edge that is not there has post = 0 and a pre drawn anew, so that the model is the same function and
its ordinary gradient says what the edge would be good for.

Axes, before those of `core/rewiring.py`: A stages and F fan members, by sets that share where
states are sent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from ngc_jax.analysis.probes import walk
from ngc_jax.core import rewiring
from ngc_jax.core.rewiring import Schedule
from ngc_jax.core.rules import emit
from ngc_jax.core.rules.signal import normal
from ngc_jax.core.wiring import carry, slots_of
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.layers import Stage, Synapse, intercept
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.shape import DYNAMIC
from ngc_jax.nn.sharing import FANS, spread
from ngc_jax.training.step import TrainState, losses

Array = jax.Array
Tree = Any
Path = tuple[str, ...]
Rewire = Callable[[TrainState, Array, Array, Array], tuple[TrainState, dict[str, Array]]]
PRE, HEARS, POST = (
    ("inter_addressed", "pre", "state"),
    ("inter_addressed", "pre", "hears"),
    ("inter_addressed", "post"),
)


def changes(config: Any) -> Schedule:
    """The schedule that a config asks for; its model's wiring is a dynamic one."""
    r, steps = config.rewire, config.train.steps
    copies = config.model.p_inter if config.model.wiring == "dynamic_ports" else 1
    begin, end = round(r.begin * steps), round(r.end * steps)
    first, last = config.model.channels * copies, r.channels * copies
    return Schedule(first, last, begin, r.every, (end - begin) // r.every, r.exchange)


def check(config: Any, need: Callable[[bool, str, str], None]) -> None:
    """The part of `config.validate` that is about `config.rewire`; need(holds, field, what it must
    be) refuses.
    """
    r, m = config.rewire, config.model
    if m.wiring not in DYNAMIC:
        return
    fewer = f"from 1 to model.channels = {m.channels}, those at the start"
    need(1 <= r.channels <= m.channels, "rewire.channels", fewer)
    need(0 <= r.begin < 1, "rewire.begin", "at least 0 and below 1, for instance 0.1")
    later = f"above rewire.begin={r.begin} and at most 1, for instance {(r.begin + 1) / 2}"
    need(r.begin < r.end <= 1, "rewire.end", later)
    span = round(r.end * config.train.steps) - round(r.begin * config.train.steps)
    need(
        1 <= r.every <= span,
        "rewire.every",
        f"from 1 to the {span} updates between rewire.begin and rewire.end",
    )
    need(0 <= r.exchange <= 1, "rewire.exchange", "from 0 to 1, for instance 0.3")
    need(
        r.regrow in rewiring.REGROW,
        "rewire.regrow",
        "one of " + ", ".join(map(repr, rewiring.REGROW)),
    )


def make_rewire(model: Decoder, config: Any, boundary: int | None = None) -> Rewire:
    """(state, batch [B, 2, T], keep, grow) -> the state with that many edges a group, and what to
    log of it.

    `keep` edges stay by magnitude, `grow` are added by `config.rewire.regrow`. An edge that stays
    keeps its states and the optimizer's moments to the bit. One that is new begins with post = 0,
    so that the model's function changes by what was given up alone, and with moments of 0. Scores
    are taken on one part of the batch where it is accumulated.
    """
    s = model.shape
    rule = s.rewirable
    assert rule is not None
    edges = (s.groups - 1) * rule.copies
    # each edge that there could be has a slot
    wide = Decoder(dataclasses.replace(s, channels=s.groups - 1))

    def loss(posts: dict[Path, Array], laid: dict[Path, Array], batch: Array) -> Array:
        dtype = jnp.dtype(config.train.compute_dtype)
        nats, counts = losses(wide, unflatten_dict(laid | posts), batch, boundary, dtype)
        return jnp.sum(nats * counts) / jnp.sum(counts)

    def promises(laid: dict[Path, Array], batch: Array, key: Array) -> dict[str, Array]:
        """What each edge promises, for each stage and fan member: {synapse: [A, F, G, E]}."""
        if config.rewire.regrow == "gradient":
            slopes = jax.grad(loss)(
                {path: p for path, p in laid.items() if path[-2:] == POST}, laid, batch
            )
            return {
                synapse: rewiring.slope(_joined(model, slopes, synapse, POST)) for synapse in FANS
            }
        if config.rewire.regrow == "correlation":
            return _correlations(wide, unflatten_dict(laid), batch[:, 0])
        posts = {synapse: _joined(model, laid, synapse, POST) for synapse in FANS}
        keys = dict(zip(FANS, jax.random.split(key, len(FANS)), strict=True))
        return {
            name: jax.random.uniform(keys[name], (*post.shape[:3], edges))
            for name, post in posts.items()
        }

    def rewire(
        state: TrainState, batch: Array, keep: Array, grow: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        fresh_key, random_key = jax.random.split(
            jax.random.fold_in(jax.random.key(s.wiring_seed), state.step)
        )
        laid = flatten_dict(state.params)
        origins: dict[str, Array] = {}  # the slot that each edge has today, or -1: [A, F, G, E]
        for i, synapse in enumerate(FANS):
            pre, hears, post = (_joined(model, laid, synapse, part) for part in (PRE, HEARS, POST))
            used = jnp.any(pre != 0, axis=(-3, -1))
            origin = origins[synapse] = slots_of(jnp.where(used, hears, -1), edges)
            drawn = normal(
                jax.random.fold_in(fresh_key, i),
                (*pre.shape[:-2], edges, pre.shape[-1]),
                pre.shape[-3],
            )
            all_pre = jnp.where(origin[..., None, :, None] < 0, drawn, carry(pre, origin))
            laid |= _parted(model, laid, synapse, PRE, all_pre)
            laid |= _parted(
                model, laid, synapse, HEARS, jnp.broadcast_to(jnp.arange(edges), origin.shape)
            )
            laid |= _parted(
                model, laid, synapse, POST, carry(post, _by_member(model, synapse, origin))
            )
        promise = promises(laid, batch[:: config.train.accumulation], random_key)

        # for each array of states, the slot that each new slot goes on from, or -1
        moves: dict[Path, Array] = {}
        fresh: dict[Path, Array] = {}  # pre states of edges that are new
        wiring: dict[Path, Array] = {}
        added = held = jnp.zeros((), jnp.int32)
        for synapse in FANS:
            pre, post = (_joined(model, laid, synapse, part) for part in (PRE, POST))
            origin = origins[synapse]
            strength = rewiring.magnitude(_by_member(model, synapse, pre), post)
            strength = jnp.where(origin < 0, -1, _by_set(model, synapse, strength))
            heard, used = rewiring.choose(
                strength, _by_set(model, synapse, promise[synapse]), keep, grow, rule.slots
            )
            slot = jnp.where(used, jnp.take_along_axis(origin, heard, axis=-1), -1)
            new = used & (slot < 0)
            added, held = added + jnp.sum(new), held + jnp.sum(used)
            moves |= _parted(model, laid, synapse, PRE, slot)
            moves |= _parted(model, laid, synapse, POST, _by_member(model, synapse, slot))
            fresh |= _parted(model, laid, synapse, PRE, carry(pre, jnp.where(new, heard, -1)))
            wiring |= _parted(model, laid, synapse, HEARS, heard)

        def move(path: tuple[Any, ...], leaf: Array) -> Array:
            """States, and whatever the optimizer keeps for them, to their new slots."""
            names = tuple(str(key.key) for key in path if hasattr(key, "key"))
            for tail, slot in moves.items():
                if names[-len(tail) :] == tail:
                    return carry(leaf, slot)
            return leaf

        params, memory = jax.tree_util.tree_map_with_path(move, (state.params, state.optimizer))
        flat = flatten_dict(params)
        params = unflatten_dict(
            flat | {path: flat[path] + pre for path, pre in fresh.items()} | wiring
        )
        row = {"wiring/density": (keep + grow) / edges, "wiring/exchanged": added / held}
        return dataclasses.replace(state, params=params, optimizer=memory), row

    return rewire


def compile_rewire(
    model: LanguageModel, config: Any, mesh: Mesh, boundary: int | None, like: Tree, batch: Any
) -> Callable[[TrainState, Array, int], tuple[TrainState, dict[str, float]]] | None:
    """`make_rewire`, compiled for a state and a batch like these: (state, batch, step) -> the state
    and a row to log.

    How many edges there are at a step is what `changes(config)` says. None where the wiring stands
    still.
    """
    if not isinstance(model, Decoder) or model.shape.rewirable is None:
        return None
    whole = meshes.replicated(mesh)
    plan, number = changes(config), jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    # It runs seldom: at optimization level 1 it compiles several times faster.
    jitted = jax.jit(
        meshes.with_mesh(mesh, make_rewire(model, config, boundary)),
        out_shardings=(meshes.shardings(like), whole),
        donate_argnums=0,
        compiler_options={"xla_backend_optimization_level": 1},
    )
    compiled = jitted.lower(like, batch, number, number).compile()

    def rewire(state: TrainState, placed: Array, step: int) -> tuple[TrainState, dict[str, float]]:
        grow = plan.exchanged(step)
        state, row = compiled(state, placed, np.int32(plan.edges(step) - grow), np.int32(grow))
        return state, {name: float(value) for name, value in jax.device_get(row).items()}

    return rewire


def pruned(
    model: LanguageModel, params: Tree, config: Any, step: int
) -> tuple[LanguageModel, Tree]:
    """The model after `step` updates without the slots that are empty by then: the same function
    for fewer products.

    Any model, also one whose wiring does not change: that is handed back as it is.
    """
    if not isinstance(model, Decoder) or model.shape.rewirable is None:
        return model, params
    copies = model.shape.rewirable.copies
    channels = -(-changes(config).edges(step) // copies)

    def cut(path: Path, leaf: Array) -> Array:
        if path[-3:] == HEARS:
            return leaf[..., : channels * copies]
        return leaf[..., : channels * copies, :] if path[-3:] == PRE or path[-2:] == POST else leaf

    cut_down = unflatten_dict(
        {path: cut(path, leaf) for path, leaf in flatten_dict(params).items()}
    )
    return Decoder(dataclasses.replace(model.shape, channels=channels)), cut_down


def _correlations(model: Decoder, network: Tree, tokens: Array) -> dict[str, Array]:
    """`rewiring.correlation` in every synapse for tokens [B, T], over rounds its mean: {synapse:
    [A, F, G, E]}.
    """
    groups = model.shape.groups

    def listen(synapse: Synapse, x: Array, y: Array) -> Array:
        (part,) = (part for part in synapse.parts if part.place == "inter")
        pre = spread(synapse.senders, synapse.variables["params"]["inter_addressed"]["pre"])
        heard = jnp.moveaxis(
            y.reshape(-1, len(synapse.senders), groups, y.shape[-1] // groups), 1, 0
        )

        def one(pre: Tree, heard: Array) -> Array:
            return rewiring.correlation(
                emit(part.how, x.reshape(-1, x.shape[-1]), pre, part.activation), heard
            )

        return jax.vmap(one)(pre, heard)

    def visit(weights: Tree, x: Array, route: Array | None) -> tuple[Array, dict[str, Array]]:
        scores: dict[str, Array] = {}
        with intercept(
            lambda synapse, x, y: scores.update({str(synapse.name): listen(synapse, x, y)})
        ):
            x = Stage(model.shape).apply(
                {"params": weights}, x, jnp.arange(tokens.shape[1]), route=route
            )[0]
        return x, scores

    found: dict[str, dict[int, list[Array]]] = {synapse: {} for synapse in FANS}
    for _, stage, scores in walk(model, network, tokens, visit):
        for synapse, score in scores.items():
            found[synapse].setdefault(stage, []).append(score)
    return {
        name: jnp.stack([sum(runs) / len(runs) for runs in stages.values()])
        for name, stages in found.items()
    }


def _stacks(model: Decoder) -> dict[Path, slice]:
    """Where the parameters of each stack of stages are, and which of all stages they are."""
    return {
        ("core", "stages") if name == "core" else (name,): rows
        for name, rows in model.rows().items()
    }


def _joined(model: Decoder, flat: dict[Path, Array], synapse: str, part: Path) -> Array:
    """One part of a synapse in all stages, from flat parameters: [A, F, ...], or by sets of A where
    these share it.
    """
    shared = ("senders", synapse, *part)
    if shared in flat:
        return flat[shared]
    return jnp.concatenate([flat[*stack, synapse, *part] for stack in _stacks(model)])


def _parted(
    model: Decoder, flat: dict[Path, Array], synapse: str, part: Path, joined: Array
) -> dict[Path, Array]:
    """What `_joined` undoes: the entries of flat parameters that hold `joined`."""
    shared = ("senders", synapse, *part)
    if shared in flat:
        return {shared: joined}
    return {(*stack, synapse, *part): joined[rows] for stack, rows in _stacks(model).items()}


def _by_member(model: Decoder, synapse: str, by_set: Array) -> Array:
    """What each set has, for each stage and fan member."""
    shared = model.shape.shared
    return spread(
        shared.in_depth(synapse), jax.vmap(lambda a: spread(shared.of(synapse), a))(by_set)
    )


def _by_set(model: Decoder, synapse: str, by_member: Array) -> Array:
    """Sums over the stages and fan members of each set, whose edges are one: `_by_member`
    transposed.
    """
    stages, members = model.shape.shared.in_depth(synapse), model.shape.shared.of(synapse)
    empty = jnp.zeros((max(stages) + 1, max(members) + 1, *by_member.shape[2:]), by_member.dtype)
    return empty.at[jnp.array(stages)[:, None], jnp.array(members)].add(by_member)
