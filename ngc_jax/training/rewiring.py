"""Rewiring a model while it trains: edges between groups given up and tried anew between updates.

For: `model.wiring="dynamic"` and "dynamic_ports". Not for: which edges (`core/rewiring.py`).
Synapses that share send states have one wiring. All is done in one layout: a slot for every edge
that could be, [A, F, G, n, E, p], A stages and F fan members, by sets that share send states. One
that is not there has post = 0 and a new pre: its gradient tells what it is good for.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ngc_jax.analysis.probes import walk
from ngc_jax.core import rewiring, rules, wiring
from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules.base import normal
from ngc_jax.data.batches import Batch
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn import stacks
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.nn.sharing import FANS, spread
from ngc_jax.nn.synapse import Heard, intercept
from ngc_jax.training.optimizer import map_like_params
from ngc_jax.training.step import SELDOM, TrainState, losses

Array = jax.Array
Tree = Any
Row = dict[str, Any]
PART = "inter_addressed"  # the summand of a synapse that is rewired


class Ports(NamedTuple):
    """The rewirable states of one synapse in all stages: by sets of A and F; `post` by members."""

    pre: Array  # [A, F, G, n, slots, p]
    hears: Array  # [A, F, G, slots]
    post: Array  # [A, F, G, m, slots, p]


def changes(config: Any) -> rewiring.Schedule:
    """The schedule that a config asks for; its model's wiring is a dynamic one."""
    r, steps, m = config.rewire, config.train.steps, config.model
    copies = m.p_inter if m.wiring == "dynamic_ports" else 1
    begin, end = round(r.begin * steps), round(r.end * steps)
    edges = m.channels * copies, r.channels * copies
    return rewiring.Schedule(*edges, begin, r.every, (end - begin) // r.every, r.exchange)


def make_rewire(model: Decoder, config: Any) -> Callable[..., tuple[TrainState, Row]]:
    """(state, batch, keep, grow) -> the state with that many edges a group, and what to log of it.

    `keep` edges stay by magnitude, with states and moments to the bit; `grow` are added, as
    `config.rewire.regrow` says, with post and moments of 0, so that the function changes by what
    was given up alone. An accumulated batch is scored on one part.
    """
    s = model.shape
    rule = s.rewirable
    assert rule is not None
    edges = (s.groups - 1) * rule.copies
    wide = model.reshaped(channels=s.groups - 1)  # a slot for each possible edge

    def promises(params: Tree, batch: Batch, key: Array) -> dict[str, Array]:
        """What each edge promises to each member: {synapse: [A, F, G, E]}."""
        if config.rewire.regrow == "correlation":
            return _correlations(wide, params, batch)
        laid = _ports(model, params)
        if config.rewire.regrow == "random":
            keys = zip(FANS, jax.random.split(key, len(FANS)), strict=True)
            of = {name: (*ports.post.shape[:3], edges) for name, ports in laid.items()}
            return {name: jax.random.uniform(key, of[name]) for name, key in keys}

        def loss(posts: dict[str, Array]) -> Array:
            given = {name: laid[name]._replace(post=post) for name, post in posts.items()}
            dtype = jnp.dtype(config.train.compute_dtype)
            nats, counts = losses(wide, _with_ports(model, params, given), batch, dtype)
            return jnp.sum(nats * counts) / jnp.sum(counts)

        slopes = jax.grad(loss)({name: ports.post for name, ports in laid.items()})
        return {name: rewiring.slope(slopes[name]) for name in FANS}

    def rewire(state: TrainState, batch: Batch, keep: Array, grow: Array) -> tuple[TrainState, Row]:
        start = jax.random.fold_in(jax.random.key(s.wiring_seed), state.step)
        fresh_key, random_key = jax.random.split(start)
        laid = _ports(model, state.params)
        origins: dict[str, Array] = {}  # the slot that each edge has today, or -1: [A, F, G, E]
        for i, (synapse, (pre, hears, post)) in enumerate(laid.items()):
            used = jnp.any(pre != 0, axis=(-3, -1))
            origin = origins[synapse] = wiring.slots_of(jnp.where(used, hears, -1), edges)
            wanted = (*pre.shape[:-2], edges, pre.shape[-1])
            drawn = normal(jax.random.fold_in(fresh_key, i), wanted, pre.shape[-3])
            laid[synapse] = Ports(
                jnp.where(origin[..., None, :, None] < 0, drawn, wiring.carry(pre, origin)),
                jnp.broadcast_to(jnp.arange(edges), origin.shape),
                wiring.carry(post, _by_member(model, synapse, origin)),
            )
        part = jax.tree.map(lambda a: a[:: config.train.accumulation], batch)
        promise = promises(_with_ports(model, state.params, laid), part, random_key)

        slots: dict[str, Array] = {}  # the slot that each new slot goes on from, or -1
        fresh: dict[str, tuple[Array, Array]] = {}  # pre states of edges that are new; the wiring
        added = held = jnp.zeros((), jnp.int32)
        for synapse, ports in laid.items():
            origin = origins[synapse]
            strength = rewiring.magnitude(_by_member(model, synapse, ports.pre), ports.post)
            strength = jnp.where(origin < 0, -1, _by_set(model, synapse, strength))
            promised = _by_set(model, synapse, promise[synapse])
            heard, used = rewiring.choose(strength, promised, keep, grow, rule.slots)
            slot = jnp.where(used, jnp.take_along_axis(origin, heard, axis=-1), -1)
            new = used & (slot < 0)
            added, held = added + jnp.sum(new), held + jnp.sum(used)
            slots[synapse] = slot
            fresh[synapse] = wiring.carry(ports.pre, jnp.where(new, heard, -1)), heard

        def moved(tree: Tree) -> Tree:
            """States, or whatever the optimizer keeps for them, in their new slots."""
            changed = {}
            for synapse, ports in _ports(model, tree).items():
                if isinstance(ports.pre, optax.MaskedNode):  # optax keeps nothing for states here
                    return tree
                post = wiring.carry(ports.post, _by_member(model, synapse, slots[synapse]))
                changed[synapse] = Ports(wiring.carry(ports.pre, slots[synapse]), ports.hears, post)
            return _with_ports(model, tree, changed)

        params, renewed = moved(state.params), {}
        for synapse, ports in _ports(model, params).items():
            new, heard = fresh[synapse]
            renewed[synapse] = Ports(ports.pre + new, heard, ports.post)
        row = {"wiring/density": (keep + grow) / edges, "wiring/exchanged": added / held}
        memory = map_like_params(moved, state.optimizer, params)
        params = _with_ports(model, params, renewed)
        return dataclasses.replace(state, params=params, optimizer=memory), row

    return rewire


def compile_rewire(
    model: LanguageModel, config: Any, mesh: Mesh, like: Tree, batch: Any
) -> Callable[[TrainState, Batch, int], tuple[TrainState, Row]] | None:
    """`make_rewire` as `changes(config)` has it at a step, compiled; None: the wiring is fixed."""
    if not isinstance(model, Decoder) or model.shape.rewirable is None:
        return None
    plan, whole = changes(config), meshes.replicated(mesh)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    program = meshes.with_mesh(mesh, make_rewire(model, config))
    put = meshes.shardings(like), whole
    jitted = jax.jit(program, out_shardings=put, donate_argnums=0, compiler_options=SELDOM)
    compiled = jitted.lower(like, batch, number, number).compile()

    def rewire(state: TrainState, batch: Batch, step: int) -> tuple[TrainState, Row]:
        grow = plan.exchanged(step)
        state, row = compiled(state, batch, np.int32(plan.edges(step) - grow), np.int32(grow))
        return state, jax.tree.map(float, jax.device_get(row))

    return rewire


def pruned(model: LanguageModel, params: Tree, config: Any, at: int) -> tuple[LanguageModel, Tree]:
    """The model after `at` updates without empty slots: the same function, fewer products."""
    if not isinstance(model, Decoder) or model.shape.rewirable is None:
        return model, params
    copies = model.shape.rewirable.copies
    channels = -(-changes(config).edges(at) // copies)

    def cut(leaf: Array, info: ParamInfo) -> Array:
        if info.kind == "wiring":
            return leaf[..., : channels * copies]
        return leaf[..., : channels * copies, :] if info.part == "inter" else leaf

    return model.reshaped(channels=channels), jax.tree.map(cut, params, model.param_info())


def _correlations(model: Decoder, params: Tree, batch: Batch) -> dict[str, Array]:
    """`rewiring.correlation` in every synapse, over rounds its mean: {synapse: [A, F, G, E]}."""
    groups = model.shape.groups

    def score(heard: Heard) -> Array:  # of the members of one call: [members, G, E]
        (part,) = (part for part in heard.synapse.parts if part.place == "inter")
        states, chosen = heard.synapse.variables["params"][part.name], np.array(heard.members)
        pre = jax.tree.map(lambda p: p[chosen], spread(heard.synapse.senders, states["pre"]))
        x = heard.x.reshape(-1, heard.x.shape[-1])
        y = heard.y.reshape(-1, len(chosen), groups, heard.y.shape[-1] // groups)

        def one(pre: Tree, y: Array) -> Array:
            return rewiring.correlation(rules.emit(part.how, x, pre, part.activation), y)

        return jax.vmap(one)(pre, jnp.moveaxis(y, 1, 0))

    def visit(
        run: Callable[..., Any], x: Array, route: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        scores: dict[str, list[Array]] = defaultdict(list)  # calls come in the order of members
        with intercept(lambda heard: scores[str(heard.synapse.name)].append(score(heard))):
            x = run(x, route)[0]
        return x, {name: jnp.concatenate(of) for name, of in scores.items()}

    found: dict[str, dict[int, list[Array]]] = {synapse: defaultdict(list) for synapse in FANS}
    for _, stage, scores in walk(model, params, batch, visit):
        for synapse, of in scores.items():
            found[synapse][stage].append(of)
    mean = lambda runs: sum(runs) / len(runs)  # noqa: E731
    return {name: jnp.stack([*map(mean, stages.values())]) for name, stages in found.items()}


def _ports(model: Decoder, params: Tree) -> dict[str, Ports]:
    """The rewirable states of each synapse, in parameters or what is kept beside them."""
    own, senders = stacks.join_stages(model.shape, params)
    found = {}
    for synapse in FANS:
        pre = (senders[synapse] if synapse in senders else own[synapse])[PART]["pre"]
        found[synapse] = Ports(pre["state"], pre.get("hears"), own[synapse][PART]["post"])
    return found


def _with_ports(model: Decoder, params: Tree, ports: dict[str, Ports]) -> Tree:
    """Parameters, or what is kept beside them, with these states; undoes `_ports`."""
    own, senders = stacks.join_stages(model.shape, params)
    own, senders = dict(own), dict(senders)
    for synapse, (state, hears, post) in ports.items():
        pre = {"state": state} if hears is None else {"state": state, "hears": hears}
        own[synapse] = own[synapse] | {PART: own[synapse][PART] | {"post": post}}
        home = senders if synapse in senders else own
        home[synapse] = home[synapse] | {PART: home[synapse][PART] | {"pre": pre}}
    return stacks.split_stages(model.shape, params, own, senders)


def _by_member(model: Decoder, synapse: str, by_set: Array) -> Array:
    """What each set has, for each stage and fan member."""
    shared = model.shape.shared
    members = jax.vmap(lambda a: spread(shared.of(synapse), a))(by_set)
    return spread(shared.in_depth(synapse), members)


def _by_set(model: Decoder, synapse: str, by_member: Array) -> Array:
    """Sums over the members of each set, whose edges are one: `_by_member` transposed."""
    shared = model.shape.shared
    stages, members = shared.in_depth(synapse), shared.of(synapse)
    empty = jnp.zeros((max(stages) + 1, max(members) + 1, *by_member.shape[2:]), by_member.dtype)
    return empty.at[jnp.array(stages)[:, None], jnp.array(members)].add(by_member)
