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
from conftest import QUICK, TINY, python

from ngc_jax import analysis as stability
from ngc_jax.analysis.probes import _loudness, walk
from ngc_jax.config import base, model_shape
from ngc_jax.core.communicate import communicate
from ngc_jax.core.rules import RULES, transmit, weights
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.layers import Stage, Synapse
from ngc_jax.nn.shape import SynapsePart
from ngc_jax.training.penalty import jacobian_penalty, make_penalty
from ngc_jax.training.stability_metrics import MEASURES, make_watch


@functools.cache
def begun(model):
    return jax.jit(model.init)(jax.random.key(0))


def build(**fields):
    config = base()
    config.update_from_flattened_dict({**TINY, "data.context": 6, "model.rounds": 3, **fields})
    model = Decoder(model_shape(config, 40))
    return model, begun(model), config


def text(rows=2, seed=1, length=6):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 40)


def compiled(function, model, params, tokens, **fields):
    """function(model, params, tokens, **fields) as one program: op by op each of its loops would be
    compiled alone.
    """
    return jax.jit(lambda params, tokens: function(model, params, tokens, **fields))(params, tokens)


# ---- Measures of states ----


def test_measures_are_their_formulas():
    x = np.random.default_rng(0).normal(size=(5, 2, 7, 4)).astype(np.float32)
    step = np.linalg.norm(np.diff(x, axis=0), axis=-1)
    np.testing.assert_allclose(stability.contraction(x), step[1:] / step[:-1], rtol=1e-5)
    size = np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(stability.boundedness(x), (size / size[0]).max(0), rtol=1e-5)
    far = np.linalg.norm(x[0] - x[1], axis=-1) / size[1]
    np.testing.assert_allclose(stability.departure(x[0], x[1]), far, rtol=1e-5)
    share = size[0] / (size[0] + size[1])
    np.testing.assert_allclose(stability.drive_ratio(x[0], x[1]), share, rtol=1e-5)
    moved = np.linalg.norm(np.diff(x[0], axis=1), axis=-1) / size[0].mean(-1, keepdims=True)
    slopes = [np.polyfit(np.arange(6), np.log(row), 1)[0] for row in moved]
    np.testing.assert_allclose(stability.token_contraction(x[0]), slopes, rtol=1e-3, atol=1e-5)


def test_token_contraction_reads_the_rate_at_which_a_sequence_settles():
    states = 5 + 0.8 ** jnp.arange(20)[:, None] * jnp.ones(3)
    assert float(stability.token_contraction(states)) == pytest.approx(np.log(0.8), abs=1e-3)


def test_token_contraction_leaves_out_tokens_that_do_not_move():
    moving = 5 + 0.8 ** jnp.arange(20)[:, None] * jnp.ones(3)
    repeated = jnp.concatenate([moving[:1], moving])
    assert float(stability.token_contraction(repeated)) == pytest.approx(np.log(0.8), abs=1e-3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: stability.contraction(jnp.ones((2, 4))), "states: 2"),
        (lambda: stability.token_contraction(jnp.ones((2, 4))), "states: 2 tokens"),
        (lambda: stability.bootstrap_interval(jnp.ones((1, 4))), "blocks: 1"),
        (lambda: stability.silenced({}, "everything"), "what='everything'"),
        (lambda: stability.silenced({}, "drive"), "what='drive'"),
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


@pytest.mark.parametrize("names", PARTS, ids="+".join)
def test_gain_bound_is_no_less_than_the_norm_and_not_far_above(names):

    @jax.jit
    def both(key):
        keys = jax.random.split(key, len(names))
        parts = [
            (name, *RULES[name].init(key, 4, 24, 16, 2))
            for name, key in zip(names, keys, strict=True)
        ]
        return sum(weights(*part) for part in parts), stability.gain_bound(parts)

    for seed in range(5):
        formed, bound = both(jax.random.key(seed))
        norm = np.linalg.norm(formed, 2)
        assert norm <= bound <= 3.5 * norm
        if len(names) == 1 and names[0] not in PAIRWISE:
            assert float(bound) == pytest.approx(norm, rel=0.01)  # where groups do not mix


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("rule", ["broadcast", "addressed"])
def test_no_round_stretches_more_than_the_bound(rule, eta):
    """On random models, random inputs and the worst of many pairs of neighbouring starts."""
    for seed in range(8):
        keys = jax.random.split(jax.random.key(seed), 5)
        scale = 0.2 + 0.2 * seed
        parts = [
            ("block", *RULES["block"].init(keys[0], 4, 16, 16, 0)),
            (rule, *RULES[rule].init(keys[1], 4, 16, 16, 2)),
        ]
        parts = [(name, pre, scale * post) for name, pre, post in parts]
        u = jax.random.normal(keys[2], (16,))

        def update(x, memory, parts=parts, u=u):
            return eta * jnp.tanh(
                sum(transmit(name, x, pre, post) for name, pre, post in parts) + u
            ), memory

        def after(x, update=update):
            return communicate(
                update, x, keep=jnp.full(16, 1 - eta), drive=jnp.zeros(16), rounds=1
            )[0]

        x = jax.random.normal(keys[3], (64, 16))
        near = x + 1e-2 * jax.random.normal(keys[4], (64, 16))
        measured = jnp.linalg.norm(after(x) - after(near), axis=-1) / jnp.linalg.norm(
            x - near, axis=-1
        )
        bound = (1 - eta) + eta * float(stability.gain_bound(parts))
        assert float(jnp.max(measured)) <= bound
        jacobians = jax.vmap(jax.jacobian(after))(x)
        assert float(jnp.max(jnp.linalg.norm(jacobians, ord=2, axis=(1, 2)))) <= bound


# ---- Our models as systems ----


def test_round_exponents_are_those_of_the_explicit_jacobian():
    model, params, _ = build(**{"model.width": 8, "model.groups": 2, "model.hidden": 8})
    tokens = text(rows=1, length=4)
    found = compiled(stability.round_exponents, model, params, tokens, rounds=6, k=3)[0]
    step, x = stability.rounds_step(model, params, tokens)
    jacobian = jax.jit(jax.jacobian(lambda x: step(x, None)))
    # The same start as the kernel's: what is compared is J formed and J never formed.
    q = np.linalg.qr(np.asarray(jax.random.normal(jax.random.key(0), (3, x.size)), np.float64).T)[0]
    total = np.zeros(3)
    for _ in range(6):
        q, r = np.linalg.qr(np.asarray(jacobian(x)).reshape(x.size, x.size) @ q)
        total += np.log(np.abs(np.diag(r)))
        x = step(x, None)
    np.testing.assert_allclose(found, -np.sort(-total / 6), atol=1e-4)


def test_depth_exponents_are_those_of_the_explicit_jacobian():
    model, params, _ = build(
        **{
            "model.prelude": 1,
            "model.core": 0,
            "model.coda": 2,
            "model.width": 8,
            "model.groups": 2,
        }
    )
    tokens = text(rows=1, length=4)
    found = compiled(stability.depth_exponents, model, params, tokens, k=1)[0, 0]
    x = params["embed"][tokens]
    jacobian = jax.jit(jax.jacobian(lambda x: model.stream(params, x, jnp.arange(4))[0]))(
        x
    ).reshape(x.size, x.size)
    start = jax.random.normal(jax.random.key(0), (x.size, 1))
    stretch = jnp.linalg.norm(jacobian @ start) / jnp.linalg.norm(start)
    assert float(found) == pytest.approx(float(jnp.log(stretch)) / 3, abs=1e-4)


def test_token_exponents_are_slopes_of_the_response():
    model, params, _ = build()
    tokens = text(rows=1)
    found = compiled(stability.token_exponents, model, params, tokens, k=16)[0]
    x = params["embed"][tokens]
    jacobian = jax.jit(jax.jacobian(lambda x: model.stream(params, x, jnp.arange(6))[0]))(x)[
        0, 1:, :, 0, 0
    ]
    values = np.log(np.linalg.svd(np.asarray(jacobian), compute_uv=False))
    slopes = np.polyfit(np.arange(5), values, 1)[0]
    np.testing.assert_allclose(found[:4], slopes[:4], atol=2e-2)


def test_round_states_are_the_loop_and_go_on_after_it():
    model, params, _ = build(**{"model.prelude": 1})
    tokens = text()
    states = compiled(stability.round_states, model, params, tokens, rounds=5)
    trained = jax.jit(lambda p: model.stream(p, p["embed"][tokens], jnp.arange(6))[0])(params)
    np.testing.assert_allclose(states[3], trained, atol=1e-5)
    assert states.shape == (6, *trained.shape)


@pytest.mark.parametrize("loop", [{}, {"model.route": "start", "model.state_activation": "tanh"}])
def test_a_walk_by_stages_ends_where_the_forward_pass_does(loop):
    model, params, _ = build(**{"model.prelude": 1, "model.coda": 1, **loop})
    tokens, positions = text(), jnp.arange(6)

    def visit(weights, x, route):
        x = Stage(model.shape).apply({"params": weights}, x, positions, route=route)[0]
        return x, x

    def walked(params):
        return walk(model, params, tokens, visit)[-1][2]

    expected = jax.jit(lambda p: model.stream(p, p["embed"][tokens], positions)[0])(params)
    np.testing.assert_allclose(jax.jit(walked)(params), expected, rtol=1e-4, atol=1e-5)


def test_departure_is_zero_with_everything_on_and_not_without():
    model, params, _ = build()
    tokens = text()
    run = jax.jit(lambda p: model.stream(p, p["embed"][tokens], jnp.arange(6))[0])
    assert float(jnp.max(stability.departure(run(params), run(params)))) == 0
    for what in ("messages", "drive"):
        assert (
            float(jnp.min(stability.departure(run(params), run(stability.silenced(params, what)))))
            > 1e-3
        )


# that W is 0 where post is holds for every rule (test_rules)
@pytest.mark.parametrize("rule", ["addressed", "tanh"])
def test_silenced_messages_leave_only_the_groups(rule):
    model, params, config = build(
        **{"model.rule": rule, "model.prelude": 0, "model.coda": 0, "model.rounds": 1}
    )
    config.model.rule = "none"
    alone = Decoder(model_shape(config, 40))
    tokens = text()
    silent = jax.jit(model.apply)(stability.silenced(params, "messages"), tokens)[0]
    # A model without messages reads the same parameters and knows nothing of the ports.
    np.testing.assert_allclose(silent, jax.jit(alone.apply)(params, tokens)[0], atol=1e-5)
    assert not np.allclose(silent, jax.jit(model.apply)(params, tokens)[0], atol=1e-3)


@pytest.mark.parametrize("rule", ["metric_diagonal", "shift"])
def test_traffic_is_what_the_blocks_of_weights_carry(rule):
    synapse = Synapse((SynapsePart("inter", rule, 4, 3, None),), 16, 24, "weights")
    x = jax.random.normal(jax.random.key(0), (5, 16))
    params = jax.jit(synapse.init)(jax.random.key(1), x)["params"]
    states = jax.tree.map(lambda p: p[0], params[f"inter_{rule}"])
    blocks = np.asarray(weights(rule, states["pre"], states["post"])).reshape(4, 6, 4, 4)
    carried = np.einsum("gjhi,thi->tgjh", blocks, np.asarray(x).reshape(5, 4, 4))
    found = _loudness(synapse.bind({"params": params}), x, 4)
    np.testing.assert_allclose(found, np.mean(carried**2, axis=(0, 2)), rtol=1e-4)


@pytest.mark.parametrize("activation", ["none", "silu"])
def test_traffic_adds_up_to_what_the_groups_hear(activation):
    model, params, _ = build(
        **{"model.message_activation": activation, "model.prelude": 1, "model.coda": 1}
    )
    loud = compiled(stability.traffic, model, params, text())
    assert set(loud) == {
        "prelude 1",
        "core 1, round 1",
        "core 1, round 2",
        "core 1, round 3",
        "coda 1",
    }
    assert all(table.shape == (4, 4) and bool(jnp.all(table > 0)) for table in loud.values())
    # A group that sends nothing is heard by nobody.
    mute = jax.tree_util.tree_map_with_path(
        lambda path, p: (
            p.at[:, :, 2].set(0) if "'pre'" in str(path) and "core" not in str(path) else p
        ),
        params,
    )
    table = compiled(stability.traffic, model, mute, text())["prelude 1"]
    assert float(jnp.max(table[:, 2])) == 0
    assert float(jnp.min(table[:, 0])) > 0


def test_models_without_a_loop_or_messages_say_so():
    model, params, _ = build(**{"model.rule": "dense", "model.core": 0, "model.coda": 2})
    with pytest.raises(ValueError, match=r"model\.core=0"):
        stability.rounds_step(model, params, text())
    with pytest.raises(ValueError, match=r"model\.rule='dense'"):
        stability.traffic(model, params, text())


# ---- In training ----


def watched(model, params, tokens, names=MEASURES, mesh=None):
    watch = make_watch(model, types.SimpleNamespace(measures=",".join(names), rounds=4))
    return jax.device_get(jax.jit(meshes.with_mesh(mesh, watch) if mesh else watch)(params, tokens))


def test_what_is_watched_is_what_was_chosen():
    model, params, _ = build()
    tokens = text()
    everything = watched(model, params, tokens)
    parts = [watched(model, params, tokens, (name,)) for name in MEASURES]
    assert all(parts)
    together = {name: value for part in parts for name, value in part.items()}
    assert together.keys() == everything.keys()
    for name, value in everything.items():
        assert together[name] == pytest.approx(float(value), rel=1e-4), name
    dense, params, _ = build(**{"model.rule": "dense", "model.core": 0, "model.coda": 2})
    assert set(watched(dense, params, tokens)) == {
        "stability/contraction_per_token",
        "stability/exponent_per_stage",
    }


def compare_devices():
    """Run by the test below in a process that has eight devices."""
    model, params, config = build(
        **{"model.groups": 8, "model.heads": 8, "model.width": 16, "model.hidden": 32}
    )
    tokens = text(rows=8)
    alone = watched(model, params, tokens)
    for axis in ("data", "group"):
        config.mesh.update({"data": 1, "group": 1, axis: 8})
        mesh = meshes.make_mesh(config.mesh)
        spread = watched(
            model,
            jax.device_put(params, meshes.shardings(meshes.abstract_shardings(mesh, params))),
            jax.device_put(tokens, meshes.batch_sharding(mesh)),
            mesh=mesh,
        )
        for name, value in alone.items():
            assert spread[name] == pytest.approx(float(value), rel=2e-4, abs=1e-5), (axis, name)


@pytest.mark.slow
def test_measures_on_eight_devices_are_those_on_one():
    """With sequences over the devices, and with the groups of every state over the devices."""
    script = "import sys; sys.path.insert(0, 'tests'); import test_stability as t; t.compare_devices(); print('equal')"
    done = python("-c", script, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}")
    assert done.stdout.endswith("equal\n"), done.stderr


def minimise(penalty, params, tokens, steps=60, rate=0.04):
    """Values of the penalty under plain gradient descent with normalised steps."""

    @jax.jit
    def step(params, i):
        value, grads = jax.value_and_grad(penalty)(
            params, tokens, jax.random.fold_in(jax.random.key(0), i)
        )
        size = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))) + 1e-12
        return jax.tree.map(lambda p, g: p - rate * g / size, params, grads), value

    values = []
    for i in range(steps):
        params, value = step(params, i)
        values.append(float(value))
    return params, values


@pytest.mark.parametrize("name", ["contraction", "exponent"])
def test_the_band_moves_what_is_measured_into_it(name):
    model, params, config = build()
    settings = config.stability
    assert make_penalty(model, settings) is None
    settings.regulariser, settings.low, settings.high = name, -2.0, -0.3
    tokens = text(rows=4)

    def measure(params):
        if name == "exponent":
            return float(
                jnp.mean(compiled(stability.round_exponents, model, params, tokens, rounds=3))
            )
        states = compiled(stability.round_states, model, params, tokens, rounds=3)
        return float(jnp.mean(jnp.log(stability.contraction(states))))

    before = measure(params)
    assert before > -0.25
    params, _ = minimise(make_penalty(model, settings), params, tokens)
    assert -2.01 < measure(params) < -0.25


def test_the_jacobian_penalty_is_unbiased_and_shrinks_the_jacobian():
    a = jax.random.normal(jax.random.key(0), (6, 6))
    keys = jax.random.split(jax.random.key(1), 4000)
    estimate = jnp.mean(
        jax.vmap(lambda key: jacobian_penalty(lambda x: a @ x, jnp.ones(6), key))(keys)
    )
    assert float(estimate) == pytest.approx(float(jnp.sum(a**2)) / 6, rel=0.05)

    model, params, config = build()
    config.stability.jacobian = 1.0
    tokens = text(rows=4)

    @jax.jit
    def size(params):
        step, _ = stability.rounds_step(model, params, tokens)
        settled = stability.round_states(model, params, tokens, 3)[-1]
        keys = jax.random.split(jax.random.key(9), 20)
        return jnp.mean(
            jax.vmap(lambda key: jacobian_penalty(lambda x: step(x, None), settled, key))(keys)
        )

    before = float(size(params))
    params, _ = minimise(make_penalty(model, config.stability), params, tokens)
    assert float(size(params)) < 0.8 * before
