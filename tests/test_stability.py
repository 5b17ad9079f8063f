"""Measures, bounds and models as systems: against NumPy, explicit Jacobians, and on eight devices
as on one.
"""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, TINY, drawn, python

from ngc_jax import analysis as stability
from ngc_jax.analysis.probes import _loudness, activations
from ngc_jax.config import base, model_shape
from ngc_jax.core.communicate import communicate
from ngc_jax.core.rules import RULES, transmit, weights
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics import measures
from ngc_jax.dynamics.lyapunov import bootstrap_interval
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.synapse import Heard, Synapse, SynapsePart
from ngc_jax.training.stability_metrics import PROBES, jacobian_penalty, make_penalty, make_watch


def build(**fields):
    config = base()
    config.update_from_flattened_dict({**TINY, "data.context": 6, "model.rounds": 3, **fields})
    model = Decoder(model_shape(config, 40))
    return model, drawn(model), config


@functools.cache
def begun(model):
    return jax.jit(model.init)(jax.random.key(0))


def text(rows=2, seed=1, length=6):
    return Batch(jax.random.randint(jax.random.key(seed), (rows, length), 0, 40))


def compiled(function, model, params, batch, **fields):
    """function(model, params, batch, **fields) as one program: op by op each of its loops would be
    compiled alone.
    """
    return jax.jit(lambda params, batch: function(model, params, batch, **fields))(params, batch)


def last_stream(model, params, batch):
    return model.stream(params, model.embed(params, batch), batch.segments)[0]


# ---- Measures of states ----


def test_measures_are_their_formulas():
    x = np.random.default_rng(0).normal(size=(5, 2, 7, 4)).astype(np.float32)
    step = np.linalg.norm(np.diff(x, axis=0), axis=-1)
    np.testing.assert_allclose(measures.contraction(x), step[1:] / step[:-1], rtol=1e-5)
    size = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(measures.boundedness(x), (size / size[0]).max(0), rtol=1e-5)
    far = np.linalg.norm(x[0] - x[1], axis=-1) / size[1]
    np.testing.assert_allclose(measures.departure(x[0], x[1]), far, rtol=1e-5)
    share = size[0] / (size[0] + size[1])
    np.testing.assert_allclose(measures.drive_ratio(x[0], x[1]), share, rtol=1e-5)
    moved = np.linalg.norm(np.diff(x[0], axis=1), axis=-1) / size[0].mean(-1, keepdims=True)
    slopes = [np.polyfit(np.arange(6), np.log(row), 1)[0] for row in moved]
    np.testing.assert_allclose(measures.token_contraction(x[0]), slopes, rtol=1e-3, atol=1e-5)


def test_token_contraction_reads_the_rate_at_which_a_sequence_settles():
    states = 5 + 0.8 ** jnp.arange(20)[:, None] * jnp.ones(3)
    assert float(measures.token_contraction(states)) == pytest.approx(np.log(0.8), abs=1e-3)


def test_token_contraction_leaves_out_tokens_that_do_not_move():
    moving = 5 + 0.8 ** jnp.arange(20)[:, None] * jnp.ones(3)
    repeated = jnp.concatenate([moving[:1], moving])
    assert float(measures.token_contraction(repeated)) == pytest.approx(np.log(0.8), abs=1e-3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: measures.contraction(jnp.ones((2, 4))), "states: 2"),
        (lambda: measures.token_contraction(jnp.ones((2, 4))), "states: 2 tokens"),
        (lambda: bootstrap_interval(jnp.ones((1, 4))), "blocks: 1"),
        (
            lambda: stability.silenced(build()[0], {}, "everything"),
            "what='everything': this model can silence 'messages' or 'drive'",
        ),
        (
            lambda: stability.silenced(build(**{"model.drive": False})[0], {}, "drive"),
            "what='drive': this model can silence 'messages'",
        ),
    ],
)
def test_refusals_name_the_argument(call, named):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the message is what is tested)
        call()
    assert named in str(refusal.value)


# ---- The bound ----

BILINEAR = ("broadcast", "addressed", "within", "block")
PARTS = [*((name,) for name in RULES), *itertools.combinations(BILINEAR, 2)]
PARTS += [("block", name) for name in RULES if name not in BILINEAR]
# bounded by the norms of groups' blocks
PAIRWISE = ("addressed", "metric", "metric_diagonal", "metric_scalar")


@functools.cache
def bounded():
    """{names: (W, bound)} of sums of rules' weights, by seed; in one program."""

    @jax.jit
    @jax.vmap
    def draw(key):
        keys = dict(zip(RULES, jax.random.split(key, len(RULES)), strict=True))
        drawn = {name: rule.init(keys[name], 4, 24, 16, 2) for name, rule in RULES.items()}
        formed = {name: weights(name, *states) for name, states in drawn.items()}
        return {
            "+".join(names): (
                sum(formed[name] for name in names),
                stability.gain_bound([(name, *drawn[name]) for name in names]),
            )
            for names in PARTS
        }

    return draw(jax.random.split(jax.random.key(0), 5))


@pytest.mark.parametrize("names", PARTS, ids="+".join)
def test_gain_bound_is_no_less_than_the_norm_and_not_far_above(names):
    for formed, bound in zip(*bounded()["+".join(names)], strict=True):
        norm = np.linalg.norm(formed, 2)
        assert norm <= bound <= 3.5 * norm
        if len(names) == 1 and names[0] not in PAIRWISE:
            assert float(bound) == pytest.approx(norm, rel=0.01)  # where groups do not mix


@pytest.mark.parametrize("rule", ["broadcast", "addressed"])
def test_no_round_stretches_more_than_the_bound(rule):
    """On random models, random inputs and the worst of many pairs of neighbouring starts."""

    @jax.jit
    def run(key, scale, eta):
        keys = jax.random.split(key, 5)
        parts = [
            ("block", *RULES["block"].init(keys[0], 4, 16, 16, 0)),
            (rule, *RULES[rule].init(keys[1], 4, 16, 16, 2)),
        ]
        parts = [(name, pre, scale * post) for name, pre, post in parts]
        u = jax.random.normal(keys[2], (16,))

        def update(x, memory):
            heard = sum(transmit(name, x, pre, post) for name, pre, post in parts)
            return eta * jnp.tanh(heard + u), memory

        def after(x):
            keep = jnp.full(16, 1 - eta)
            return communicate(update, x, keep=keep, drive=jnp.zeros(16), rounds=1)[0]

        x = jax.random.normal(keys[3], (64, 16))
        near = x + 1e-2 * jax.random.normal(keys[4], (64, 16))
        moved = jnp.linalg.norm(after(x) - after(near), axis=-1)
        measured = moved / jnp.linalg.norm(x - near, axis=-1)
        bound = (1 - eta) + eta * stability.gain_bound(parts)
        return jnp.max(measured), jax.vmap(jax.jacobian(after))(x), bound

    for eta, seed in itertools.product((0.3, 1.0), range(8)):
        measured, jacobians, bound = run(jax.random.key(seed), 0.2 + 0.2 * seed, eta)
        assert measured <= bound
        assert np.max(np.linalg.norm(jacobians, ord=2, axis=(1, 2))) <= bound


# ---- Our models as systems ----


def apart(x, first):
    """The same tokens as two documents, the first of so many tokens."""
    segments = (jnp.arange(x.inputs.shape[1]) >= first).astype(jnp.int32)
    return x.replace(segments=jnp.broadcast_to(segments, x.inputs.shape))


SMALL = {"model.width": 8, "model.groups": 2, "model.hidden": 8}


def test_round_exponents_are_those_of_the_explicit_jacobian():
    model, params, _ = build(**SMALL)
    batch = apart(text(rows=1, length=4), 2)
    found = compiled(stability.round_exponents, model, params, batch, rounds=6, k=3)[0]

    @jax.jit
    def advance(params, x):
        step, _ = stability.rounds_step(model, params, batch)
        return step(x, None), jax.jacobian(lambda x: step(x, None))(x)

    # The same start as the kernel's: what is compared is J formed and J never formed.
    start = np.asarray(jax.random.normal(jax.random.key(0), (3, 4 * 8)), np.float64)
    q, total = np.linalg.qr(start.T)[0], np.zeros(3)
    x = model.embed(params, batch)  # there is no prelude
    for _ in range(6):
        x, jacobian = advance(params, x)
        assert not np.any(jacobian[:, :2, :, :, 2:])  # no document reads the other
        assert not np.any(jacobian[:, 2:, :, :, :2])
        q, r = np.linalg.qr(np.asarray(jacobian).reshape(x.size, x.size) @ q)
        total += np.log(np.abs(np.diag(r)))
    np.testing.assert_allclose(found, -np.sort(-total / 6), atol=1e-4)


def test_depth_exponents_are_those_of_the_explicit_jacobian():
    model, params, _ = build(**SMALL, **{"model.prelude": 1, "model.core": 0, "model.coda": 2})
    batch = apart(text(rows=1, length=4), 3)
    found = compiled(stability.depth_exponents, model, params, batch, k=1)[0, 0]
    x = model.embed(params, batch)
    last = lambda x: model.stream(params, x, batch.segments)[0]  # noqa: E731
    jacobian = jax.jit(jax.jacobian(last))(x).reshape(x.size, x.size)
    start = jax.random.normal(jax.random.key(0), (x.size, 1))
    stretch = jnp.linalg.norm(jacobian @ start) / jnp.linalg.norm(start)
    assert float(found) == pytest.approx(float(jnp.log(stretch)) / 3, abs=1e-4)


def test_token_exponents_are_slopes_of_the_response():
    model, params, _ = build()
    batch = apart(text(rows=1, length=8), 2)
    found = compiled(stability.token_exponents, model, params, batch, k=16, source=2)[0]
    x = model.embed(params, batch)
    last = lambda x: model.stream(params, x, batch.segments)[0]  # noqa: E731
    jacobian = jax.jit(jax.jacobian(last))(x)[0, 3:, :, 0, 2]
    values = np.log(np.linalg.svd(np.asarray(jacobian), compute_uv=False))
    slopes = np.polyfit(np.arange(5), values, 1)[0]
    np.testing.assert_allclose(found[:4], slopes[:4], atol=2e-2)


def test_round_states_are_the_loop_and_go_on_after_it():
    model, params, _ = build(**{"model.prelude": 1})
    batch = apart(text(), 4)
    states = compiled(stability.round_states, model, params, batch, rounds=5)
    trained = compiled(last_stream, model, params, batch)
    np.testing.assert_allclose(states[3], trained, atol=1e-5)
    assert states.shape == (6, *trained.shape)


@pytest.mark.parametrize("loop", [{}, {"model.route": "start", "model.state_activation": "tanh"}])
def test_a_walk_by_stages_ends_where_the_forward_pass_does(loop):
    model, params, _ = build(**{"model.prelude": 1, "model.coda": 1, "model.rounds": 2, **loop})
    batch = apart(text(rows=1), 3)
    stream = compiled(activations, model, params, batch)
    last = compiled(last_stream, model, params, batch)
    rounds = {f"{state}round {turn}" for state in ("core 1, ", "") for turn in (1, 2)}
    assert {*stream} == {"embedding", "prelude 1", *rounds, "coda 1"}
    np.testing.assert_allclose(stream["coda 1"], last, rtol=1e-4, atol=1e-5)


def test_departure_is_zero_with_everything_on_and_not_without():
    model, params, _ = build()
    run = jax.jit(functools.partial(last_stream, model))
    here = run(params, text())
    assert float(jnp.max(measures.departure(here, here))) == 0
    for what in ("messages", "drive"):
        without = run(stability.silenced(model, params, what), text())
        assert float(jnp.min(measures.departure(here, without))) > 1e-3


# that W is 0 where post is holds for every rule (test_rules)
@pytest.mark.parametrize("rule", ["addressed", "tanh"])
def test_silenced_messages_leave_only_the_groups(rule):
    model, params, config = build(
        **{"model.rule": rule, "model.prelude": 0, "model.coda": 0, "model.rounds": 1}
    )
    config.model.rule = "none"
    alone = Decoder(model_shape(config, 40))
    apply = jax.jit(lambda params: model.apply(params, text())[0])
    silent = apply(stability.silenced(model, params, "messages"))
    # A model without messages reads the same parameters and knows nothing of the ports.
    expected = jax.jit(lambda params: alone.apply(params, text())[0])(params)
    np.testing.assert_allclose(silent, expected, atol=1e-5)
    assert not np.allclose(silent, apply(params), atol=1e-3)


@pytest.mark.parametrize("rule", ["metric_diagonal", "shift"])
def test_traffic_is_what_the_blocks_of_weights_carry(rule):
    synapse = Synapse((SynapsePart("inter", rule, 4, 3, None),), 16, 24, "weights")
    x = jax.random.normal(jax.random.key(0), (5, 16))
    params = jax.jit(synapse.init)(jax.random.key(1), x)["params"]
    states = jax.tree.map(lambda p: p[0], params[f"inter_{rule}"])
    blocks = np.asarray(weights(rule, states["pre"], states["post"])).reshape(4, 6, 4, 4)
    carried = np.einsum("gjhi,thi->tgjh", blocks, np.asarray(x).reshape(5, 4, 4))
    found = _loudness(Heard(synapse.bind({"params": params}), (0,), x, None), 4)
    np.testing.assert_allclose(found, np.mean(carried**2, axis=(0, 2)), rtol=1e-4)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_traffic_adds_up_to_what_the_groups_hear(activation):
    model, params, _ = build(
        **{"model.message_activation": activation, "model.prelude": 1, "model.rounds": 2}
    )
    traffic = jax.jit(functools.partial(stability.traffic, model))
    loud = traffic(params, text())
    assert set(loud) == {"prelude 1", "core 1, round 1", "core 1, round 2"}
    assert all(table.shape == (4, 4) and bool(jnp.all(table > 0)) for table in loud.values())

    # A group that sends nothing is heard by nobody.
    def mute(p, info):
        return p.at[:, :, 2].set(0) if info.side == "pre" else p

    prelude = jax.tree.map(mute, params["prelude"], model.param_info()["prelude"])
    table = traffic({**params, "prelude": prelude}, text())["prelude 1"]
    assert float(jnp.max(table[:, 2])) == 0
    assert float(jnp.min(table[:, 0])) > 0


def test_models_without_a_loop_or_messages_say_so():
    model, params, _ = build(**{"model.rule": "dense", "model.core": 0, "model.coda": 2})
    with pytest.raises(ValueError, match=r"model\.core=0"):
        stability.rounds_step(model, params, text())
    with pytest.raises(ValueError, match=r"model\.rule='dense'"):
        stability.traffic(model, params, text())


# ---- In training ----


def watching(model, *names):
    return make_watch(model, types.SimpleNamespace(measures=",".join(names), rounds=4))


def test_what_is_watched_is_what_was_chosen():
    model, params, _ = build()

    @jax.jit
    def watched(params, batch):
        each = [watching(model, name)(params, batch) for name in PROBES]
        return watching(model, *PROBES)(params, batch), each

    everything, parts = watched(params, text())
    assert all(parts)
    together = {name: value for part in parts for name, value in part.items()}
    assert together.keys() == everything.keys()
    for name, value in everything.items():
        assert together[name] == pytest.approx(float(value), rel=1e-4), name
    dense, params, _ = build(**{"model.rule": "dense", "model.core": 0, "model.coda": 2})
    assert set(jax.eval_shape(watching(dense, *PROBES), params, text())) == {
        "stability/contraction_per_token",
        "stability/exponent_per_stage",
    }


def compare_devices():
    """Run by the test below in a process that has eight devices."""
    model, params, config = build(
        **{"model.groups": 8, "model.heads": 8, "model.width": 16, "model.hidden": 32}
    )
    batch, watch = text(rows=8), watching(model, *PROBES)
    alone = jax.device_get(jax.jit(watch)(params, batch))
    for axis in ("data", "group"):
        config.mesh.update({"data": 1, "group": 1, axis: 8})
        mesh = meshes.make_mesh(config.mesh)
        put = functools.partial(meshes.abstract_param, mesh)
        placed = meshes.shardings(jax.tree.map(put, params, model.param_info()))
        spread = jax.jit(meshes.with_mesh(mesh, watch))(
            jax.device_put(params, placed), meshes.put_batch(mesh, jax.tree.map(np.asarray, batch))
        )
        for name, value in alone.items():
            assert spread[name] == pytest.approx(float(value), rel=2e-4, abs=1e-5), (axis, name)


@pytest.mark.slow
def test_measures_on_eight_devices_are_those_on_one():
    """With sequences over the devices, and with the groups of every state over the devices."""
    script = "import sys; sys.path.insert(0, 'tests'); import test_stability as t\n"
    script += "t.compare_devices(); print('equal')"
    done = python("-c", script, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}")
    assert done.stdout.endswith("equal\n"), done.stderr


def minimise(penalty, params, batch, steps=60, rate=0.04):
    """Parameters after plain gradient descent on the penalty, with normalised steps."""

    @jax.jit
    def descend(params):
        def step(params, i):
            key = jax.random.fold_in(jax.random.key(0), i)
            grads = jax.grad(penalty)(params, batch, key)
            size = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))) + 1e-12
            return jax.tree.map(lambda p, g: p - rate * g / size, params, grads), None

        return jax.lax.scan(step, params, jnp.arange(steps))[0]

    return descend(params)


@pytest.mark.parametrize("name", ["contraction", "exponent"])
def test_the_band_moves_what_is_measured_into_it(name):
    model, _, config = build()
    params, settings = begun(model), config.stability
    assert make_penalty(model, settings) is None
    settings.regulariser, settings.low, settings.high = name, -2.0, -0.3
    batch = text(rows=4)

    @jax.jit
    def measure(params):
        if name == "exponent":
            return jnp.mean(stability.round_exponents(model, params, batch, rounds=3))
        states = stability.round_states(model, params, batch, rounds=3)
        return jnp.mean(jnp.log(measures.contraction(states)))

    assert measure(params) > -0.25
    params = minimise(make_penalty(model, settings), params, batch)
    assert -2.01 < measure(params) < -0.25


def test_the_jacobian_penalty_is_unbiased_and_shrinks_the_jacobian():
    a = jax.random.normal(jax.random.key(0), (6, 6))
    keys = jax.random.split(jax.random.key(1), 4000)
    estimate = jnp.mean(
        jax.vmap(lambda key: jacobian_penalty(lambda x: a @ x, jnp.ones(6), key))(keys)
    )
    assert float(estimate) == pytest.approx(float(jnp.sum(a**2)) / 6, rel=0.05)

    model, _, config = build()
    config.stability.jacobian = 1.0
    params, batch = begun(model), text(rows=4)

    @jax.jit
    def size(params):
        step, _ = stability.rounds_step(model, params, batch)
        settled = stability.round_states(model, params, batch, 3)[-1]
        keys = jax.random.split(jax.random.key(9), 20)
        return jnp.mean(
            jax.vmap(lambda key: jacobian_penalty(lambda x: step(x, None), settled, key))(keys)
        )

    before = float(size(params))
    params = minimise(make_penalty(model, config.stability), params, batch)
    assert float(size(params)) < 0.8 * before
