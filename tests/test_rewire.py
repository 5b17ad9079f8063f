"""Wirings that change: schedule, scores and choice against plain loops, what a rewiring leaves as
it was, and a run.
"""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, batch_of
from flax.traverse_util import flatten_dict, unflatten_dict

import ngc_jax
from ngc_jax import count
from ngc_jax.analysis import gain_bound, round_states
from ngc_jax.config import base, model_shape, validate
from ngc_jax.core import rewiring
from ngc_jax.core.rules.addressed import Rewirable
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.layers import RMSNorm, Stage
from ngc_jax.nn.stacks import stages_of
from ngc_jax.nn.synapse import intercept
from ngc_jax.runtime.checkpoint import digest
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import TIMES, read_rows
from ngc_jax.training import loop as train
from ngc_jax.training.load import load
from ngc_jax.training.rewiring import make_rewire
from ngc_jax.training.step import init_state, losses

G, N, M = 4, 3, 2


def test_the_schedule_is_followed_to_its_end():
    plan = rewiring.Schedule(first=16, last=4, begin=10, every=5, count=4, exchange=0.5)
    steps = [step for step in range(60) if plan.due(step)]
    assert steps == [15, 20, 25, 30]
    for i, step in enumerate(steps, 1):
        edges = round(4 + 12 * (1 - i / 4) ** 3)
        assert plan.edges(step) == edges
        assert plan.exchanged(step) == round(0.25 * (1 + math.cos(math.pi * i / 4)) * edges)
    assert [plan.edges(step) for step in (0, 14, 19, 30, 99)] == [16, 16, plan.edges(15), 4, 4]
    assert plan.exchanged(30) == 0


def test_scores_are_those_of_plain_loops():
    draw, (edges, p, tokens) = np.random.default_rng(0), (5, 2, 11)
    pre, post = draw.normal(size=(G, N, edges, p)), draw.normal(size=(G, M, edges, p))
    signal, heard = draw.normal(size=(tokens, G, edges, p)), draw.normal(size=(tokens, G, M))
    strong, steep, together = (np.zeros((G, edges)) for _ in range(3))
    for g in range(G):
        for e in range(edges):
            strong[g, e] = np.linalg.norm(post[g, :, e] @ pre[g, :, e].T)
            steep[g, e] = np.linalg.norm(post[g, :, e])
            pairs = [(signal[:, g, e, q], heard[:, g, j]) for q in range(p) for j in range(M)]
            together[g, e] = np.mean([abs(np.corrcoef(a, b)[0, 1]) for a, b in pairs])
    np.testing.assert_allclose(jax.jit(rewiring.magnitude)(pre, post), strong, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(rewiring.slope)(post), steep, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(rewiring.correlation)(signal, heard), together, rtol=1e-4)


@pytest.mark.parametrize(("keep", "grow"), [(3, 2), (5, 0), (0, 5), (1, 5)])
def test_the_choice_is_that_of_a_plain_loop(keep, grow):
    draw, edges, slots = np.random.default_rng(1), 9, 6
    strength, promise = (
        draw.integers(0, 4, (G, edges)).astype(float),
        draw.integers(0, 3, (G, edges)).astype(float),
    )
    strength[:, 5:] = -1  # not there
    promise[0, :2] = np.nan  # of a batch that was not finite: never first choice, and no crash
    heard, used = jax.jit(rewiring.choose, static_argnums=4)(strength, promise, keep, grow, slots)
    for g in range(G):
        kept = sorted(range(edges), key=lambda e, g=g: (-strength[g, e], e))[:keep]
        rest = [e for e in range(edges) if e not in kept]
        grown = sorted(rest, key=lambda e, g=g: (e < 5, -np.nan_to_num(promise[g, e]), e))[:grow]
        assert heard[g][used[g]].tolist() == sorted(kept + grown)
        assert len(set(heard[g].tolist())) == slots


@pytest.mark.parametrize(
    ("copies", "slots", "dim", "activation"), [(1, 3, 2, None), (3, 7, 1, "silu")]
)
def test_a_wiring_that_is_data_makes_the_masked_product(copies, slots, dim, activation):
    rule = Rewirable(slots, copies)
    pre, post = rule.init(jax.random.key(0), G, G * N, G * M, dim)
    x = jax.random.normal(jax.random.key(1), (6, G * N))
    full_pre, full_post = np.zeros((G, N, G, copies * dim)), np.zeros((G, M, G, copies * dim))
    for g in range(G):
        for s, edge in enumerate(np.asarray(pre["hears"])[g]):
            h, numbers = (g + 1 + edge // copies) % G, (edge % copies) * dim + np.arange(dim)
            full_pre[h, :, g, numbers] = np.asarray(pre["state"])[g, :, s].T
            full_post[g, :, h, numbers] = np.asarray(post)[g, :, s].T
    full_pre, full_post = full_pre.astype(np.float32), full_post.astype(np.float32)

    @jax.jit
    def both(x, pre, post):
        one = None if activation is None else x[0]  # a message activation gates W by the token
        y, masked = ngc_jax.transmit(rule, x, pre, post, activation), (full_pre, full_post)
        expected = ngc_jax.transmit("addressed", x, *masked, activation)
        return (
            y,
            expected,
            ngc_jax.weights(rule, pre, post, one, activation),
            gain_bound([(rule, pre, post)]),
        )

    y, expected, W, bound = both(x, pre, post)
    np.testing.assert_allclose(y, expected, atol=2e-6)
    np.testing.assert_allclose(y[0], W @ x[0], atol=2e-6)
    assert activation or np.linalg.norm(W, 2) <= bound <= 3 * np.linalg.norm(W, 2)


SMALL = {
    "model.prelude": 1,
    "model.core": 0,
    "model.coda": 0,
    "model.p_intra": 0,
    "model.p_inter": 2,
}
CHANGING = {"model.wiring": "dynamic", "model.channels": 3, "rewire.channels": 1, "rewire.every": 3}
DYNAMIC = {**TINY, **SMALL, **CHANGING, "train.steps": 12, "stability.every": 0}


def settings(**fields):
    config = base()
    config.update_from_flattened_dict({**DYNAMIC, **fields})
    validate(config)
    return config


def start(config):
    """A model, and a state as if of some run: numbers drawn at random, which compiles nothing."""
    model = Decoder(model_shape(config, Bytes.vocab))
    draw, rule = np.random.default_rng(0), model.shape.rewirable

    def some(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.array(
                draw.uniform(0.1, 0.3, leaf.shape) * draw.choice([-1, 1], leaf.shape), leaf.dtype
            )
        edges = np.arange((G - 1) * rule.copies)
        order = draw.permuted(np.broadcast_to(edges, (*leaf.shape[:-1], len(edges))), axis=-1)
        return (
            jnp.array(order[..., : rule.slots], leaf.dtype) if leaf.ndim else jnp.zeros_like(leaf)
        )

    return model, jax.tree.map(some, jax.eval_shape(lambda: init_state(model, config.train, 0)))


def batch(seed=0):
    """Rows of three documents that do not see each other."""
    found = batch_of(jax.random.randint(jax.random.key(seed), (8, 17), 0, 256))
    return found.replace(segments=np.broadcast_to(np.arange(16, dtype=np.int32) // 6, (8, 16)))


def edges_of(model, params):
    """All edges that are there: {(stack and synapse, stage, member, group): {edge: (pre [n, p],
    post [m, p])}}.
    """
    found, flat = (
        {},
        {
            path: np.asarray(leaf)
            for path, leaf in flatten_dict(model.expand_shared(params)).items()
        },
    )
    for path in (path for path in flat if path[-2:] == ("inter_addressed", "post")):
        pres, hears = (flat[*path[:-1], "pre", name] for name in ("state", "hears"))
        for stage, member, g in np.ndindex(flat[path].shape[:3]):
            place = (stage, model.shape.shared.of(path[-3])[member], g)
            pre, post = pres[place], flat[path][stage, member, g]
            there = [s for s in range(pre.shape[1]) if pre[:, s].any()]
            found[path, stage, member, g] = {
                hears[place][s]: (pre[:, s], post[:, s]) for s in there
            }
    return found


def slopes(model, params):
    """|dL/dpost| of each edge, for places as in `edges_of`, by a fixed wiring with the same
    channels: `others`.
    """
    shape, flat = model.shape, flatten_dict(model.expand_shared(params))
    copies = shape.rewirable.copies
    plain = Decoder(dataclasses.replace(shape, wiring="others", sharing="none"))
    # The edge of each number that a group hears, by the speaker's number: [G, (G - 1) copies].
    numbers = [
        [((h - g - 1) % G) * copies + q for h in range(G) if h != g for q in range(copies)]
        for g in range(G)
    ]
    for path in [path for path in flat if path[-1] == "hears"]:
        members, out = np.array(shape.shared.of(path[-4])), (*path[:-2], "post")
        pre, order = (
            np.asarray(flat.pop((*path[:-1], name)))[:, members] for name in ("state", "hears")
        )
        where = np.argsort(order)[..., np.arange(G)[:, None], numbers][..., None, :, None]
        moved = (np.take_along_axis(a, where, -2) for a in (pre, np.asarray(flat[out])))
        flat[path[:-1]], flat[out] = (a.reshape(*a.shape[:-2], G - 1, copies) for a in moved)

    examples = batch()

    def loss(params):
        nats, counts = losses(plain, params, examples, jnp.float32)
        return jnp.sum(nats * counts) / jnp.sum(counts)

    found = {}
    for path, grad in flatten_dict(jax.jit(jax.grad(loss))(unflatten_dict(flat))).items():
        for place in np.ndindex(grad.shape[:3]) if path[-1] == "post" else ():
            steep = np.linalg.norm(grad[place], axis=0).ravel()
            found[(path, *place)] = dict(zip(numbers[place[2]], steep, strict=True))
    return found


def correlations(model, params):
    """|Pearson's correlation| of what each edge carries and what its listeners receive, likewise,
    in the one stage of a loop whose queries and keys are read from where it began.
    """
    examples, (stage,) = batch(), stages_of(params["core"]["stages"])
    read = {}

    @jax.jit
    def inputs(params):
        states = round_states(model, params, examples, model.shape.rounds - 1)
        norm, found = RMSNorm().bind({"params": stage["attention_norm"]}), []
        for x in states:
            with intercept(lambda heard: read.update({str(heard.synapse.name): heard.x})):
                at = jnp.arange(x.shape[1])
                Stage(model.shape).apply(
                    {"params": stage}, x, at, examples.segments, route=states[0]
                )
            own = {name: read[name] for name in ("attention_out", "gate_up", "down")}
            found.append({**own, "value": norm(x), "query": norm(states[0])})
        return found

    found, rounds = {}, jax.device_get(inputs(params))
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    for path in (path for path in flat if path[-2:] == ("inter_addressed", "post")):
        pres, hears = (flat[*path[:-1], "pre", name][0] for name in ("state", "hears"))
        for member in range(len(pres)):
            reads = {"query_key_value": ("query", "query", "value")[member]}.get(path[-3], path[-3])
            for g in range(G):
                total = dict.fromkeys(range(6), 0.0)
                for x in (one[reads].reshape(-1, G, pres.shape[2]) for one in rounds):
                    said = [x[:, (g + 1 + edge // 2) % G] for edge in hears[member, g]]
                    sent = np.stack([z @ pres[member, g, :, e, 0] for e, z in enumerate(said)], 1)
                    received = sent @ flat[path][0, member, g, :, :, 0].T
                    both = np.abs(np.corrcoef(sent.T, received.T)[:6, 6:]).mean(1)
                    for edge, score in zip(hears[member, g], both, strict=True):
                        total[edge] += score / len(rounds)
                found[path, 0, member, g] = total
    return found


LOOP = {"model.prelude": 0, "model.core": 1, "model.rounds": 2, "model.route": "start"}


@pytest.mark.parametrize(
    ("promises", "fields"),
    [
        (slopes, {"model.sharing": "qkv,depth2", "model.prelude": 2}),
        (correlations, {"rewire.regrow": "correlation", **LOOP}),
    ],
    ids=["gradient, shared", "correlation, of a route"],
)
def test_what_is_given_up_what_is_taken_and_what_stays_as_it_was(promises, fields):
    """Ports, and documents that do not see each other."""
    config = settings(**{"model.wiring": "dynamic_ports", **fields})
    model, state = start(config)
    rewire = jax.jit(make_rewire(model, config))

    # Of all 6 edges of a group: 2 by magnitude, 2 by what they promise.
    after, row = rewire(state, batch(), np.int32(2), np.int32(2))
    assert (float(row["wiring/density"]), float(row["wiring/exchanged"])) == (
        pytest.approx(2 / 3),
        0,
    ), "there was nothing else to take"
    old, new = edges_of(model, state.params), edges_of(model, after.params)
    promised = promises(model, state.params)
    for (path, stage, member, g), now in new.items():
        sets = model.shape.shared.of(path[-3])
        stages = range(model.shape.prelude + model.shape.core)
        one = [(path, s, f, g) for s in stages for f in range(len(sets)) if sets[f] == sets[member]]
        strength = [
            sum(np.linalg.norm(np.outer(*old[place][e])) for place in one) for e in range(6)
        ]
        promise = [sum(promised[place][e] for place in one) for e in range(6)]
        kept = np.argsort(strength)[-2:].tolist()
        grown = sorted(set(range(6)) - set(kept), key=lambda e, promise=promise: promise[e])[-2:]
        assert now.keys() == {*kept, *grown}
        for edge in now:
            jax.tree.map(
                np.testing.assert_array_equal, now[edge], old[path, stage, member, g][edge]
            )
    moments = [np.asarray(leaf) for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim == 6]
    assert len(moments) == 2 * 8, "both moments of what four synapses send and receive with"
    for leaf in moments:
        assert ((leaf != 0).any((-3, -1)) == (np.arange(6) < 4)).all()

    # Then to 3, of which 2 may be edges that were not there: these have a voice, and are not heard
    # yet.
    last, row = rewire(after, batch(1), np.int32(1), np.int32(2))
    added = total = 0
    for place, now in edges_of(model, last.params).items():
        total += len(now)
        for edge, (pre, post) in now.items():
            if edge in new[place]:
                jax.tree.map(np.testing.assert_array_equal, (pre, post), new[place][edge])
            else:
                added += 1
                assert not post.any()
    assert total == 3 * len(new)
    assert added
    assert 0 < float(row["wiring/exchanged"]) <= 0.67


def test_edges_that_are_not_there_cost_nothing():
    """XLA's own count of the compiled synapse: 4 of 16 channels, chosen at random, against all."""
    groups, width, x = 16, 256, jnp.zeros((64, 256))

    def flops(rule):
        pre, post = rule.init(jax.random.key(0), groups, width, width, 2)
        cost = (
            jax.jit(lambda x, pre, post: ngc_jax.transmit(rule, x, pre, post))
            .lower(x, pre, post)
            .compile()
        )
        return cost.cost_analysis()["flops"]

    assert flops(Rewirable(4)) <= 0.35 * flops(ngc_jax.RULES["addressed"])


def test_a_run_that_lost_its_latter_part_makes_it_again_to_the_bit(tiny, tmp_path):
    """Killed before the first of three rewirings; then the finished model, opened, without what has
    become empty.
    """
    fields = {"data.path": tiny.data.path, "data.cache_dir": tiny.data.cache_dir, "eval.every": 100}
    fields |= {"model.wiring": "dynamic_ports", "model.channels": 2, "rewire.regrow": "correlation"}
    fields |= {"rewire.channels": 1, "rewire.exchange": 0.9}
    config = settings(**fields, **{"checkpoint.every_steps": 2, "checkpoint.keep": 6})
    assert train.run(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in range(4, 13, 2):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(step))
    assert train.run(config, tmp_path / "parts")
    whole, parts = (load(tmp_path / name) for name in ("whole", "parts"))
    assert digest(whole.state) == digest(parts.state)
    rows, again = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert rows == again
    changed, third = (
        {row["step"]: row for row in rows if "wiring/density" in row},
        pytest.approx(1 / 3),
    )
    assert {step: row["wiring/density"] for step, row in changed.items()} == {
        3: 1 / 2,
        6: third,
        9: third,
    }
    assert changed[3]["wiring/exchanged"] == pytest.approx(2 / 3)
    full = Decoder(model_shape(config, Bytes.vocab))
    kept = edges_of(full, whole.state.params)
    assert {len(edges) for edges in kept.values()} == {2}, (
        "what is empty stays empty while the rest learns"
    )
    assert all(post.any() for edges in kept.values() for _, post in edges.values())
    assert whole.model.shape.channels == 1
    jax.tree.map(np.testing.assert_array_equal, edges_of(whole.model, whole.params), kept)
    stored = count.parameters(whole.params, whole.model.param_info())
    assert stored.matrices < count.parameters(whole.state.params, full.param_info()).matrices
    assert f"{stored.total:,} stored" in (tmp_path / "whole" / "card.md").read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.channels": 4}, "model.channels=4: must be less than model.groups=4"),
        ({"rewire.channels": 5}, "rewire.channels=5: must be from 1 to model.channels = 3"),
        (
            {"rewire.end": 0.0},
            "rewire.end=0.0: must be above rewire.begin=0.0 and at most 1, for instance 0.5",
        ),
        ({"rewire.every": 10}, "rewire.every=10: must be from 1 to the 9 updates between"),
        ({"rewire.exchange": 1.5}, "from 0 to 1, for instance 0.3"),
        ({"rewire.regrow": "hebb"}, "one of 'gradient', 'correlation', 'random'"),
        ({"model.rule": "broadcast"}, "model.wiring='dynamic': must be 'complete' unless"),
    ],
)
def test_impossible_changes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        settings(**fields)
