"""The optimizer: schedules, which parameter is what, learning rates and decay by kind, Muon."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngc_jax.config import base, model_shape
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.params import describe, stacked
from ngc_jax.nn.synapse import Synapse, SynapsePart
from ngc_jax.training import optimizer as optim


def settings(**fields):
    config = base().train
    config.update(
        {
            "steps": 100,
            "warmup_steps": 10,
            "learning_rate": 0.01,
            "state_learning_rate": 0.03,
            **fields,
        }
    )
    return config


def rate(config, step):
    return float(optim.schedule(config, jnp.asarray(step)))


def test_cosine_warms_up_and_ends_at_its_share():
    config = settings(final_fraction=0.1)
    assert rate(config, 0) == pytest.approx(1 / 11)
    assert rate(config, 10) == pytest.approx(1)
    assert rate(config, 55) == pytest.approx(0.55)
    assert rate(config, 100) == pytest.approx(0.1)
    ours = [rate(config, s) for s in range(10, 101)]
    reference = optax.cosine_decay_schedule(1.0, 90, 0.1)
    np.testing.assert_allclose(ours, [reference(s - 10) for s in range(10, 101)], rtol=1e-5)


def test_wsd_is_stable_then_decays_linearly():
    config = settings(schedule="wsd", decay_fraction=0.2, final_fraction=0.0)
    assert [rate(config, s) for s in (10, 50, 80)] == pytest.approx([1, 1, 1])
    assert rate(config, 90) == pytest.approx(0.5)
    assert rate(config, 100) == pytest.approx(0)


@pytest.mark.parametrize(("steps", "fraction"), [(100, 0.2), (12, 0.5), (30, 0.1), (7, 0.01)])
def test_updates_before_the_decay_are_those_of_any_longer_run(steps, fraction):
    how = {"schedule": "wsd", "decay_fraction": fraction, "warmup_steps": 2}
    short, longer = settings(**how, steps=steps), settings(**how, steps=2 * steps)
    count = optim.stable_updates(short)
    assert [rate(short, s) for s in range(count)] == [rate(longer, s) for s in range(count)]
    assert rate(short, count) < rate(longer, count)
    assert optim.stable_updates(settings(schedule="cosine")) == 0


def test_no_warm_up_starts_at_the_peak():
    assert rate(settings(warmup_steps=0), 0) == pytest.approx(1)


def build(**fields):
    """Parameters of a small model of one stage, drawn without compiling, and their records."""
    config = base()
    config.model.update({"width": 16, "hidden": 32, "groups": 4, "heads": 2})
    config.model.update({"prelude": 0, "core": 1, "coda": 0, **fields})
    model = Decoder(model_shape(config, 20))
    draw, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    drawn = jax.tree.map(lambda p: draw.standard_normal(p.shape).astype(np.float32), shapes)
    return drawn, model.param_info()


@pytest.fixture(scope="module")
def small():
    return build(p_intra=2)


def test_states_have_their_own_learning_rate(small):
    params, info = small
    ones = jax.tree.map(jnp.ones_like, params)
    moved = optim.apply(settings(), params, ones, jnp.asarray(10), info)
    for one, old, new in zip(*map(jax.tree.leaves, (info, params, moved)), strict=True):
        rate = 0.03 if one.kind == "state" else 0.01
        np.testing.assert_allclose(old - new, rate, rtol=1e-4)


def test_only_matrices_and_states_decay(small):
    params, info = small
    for name in ("adamw", "muon"):
        chain = optim.make_optimizer(settings(weight_decay=0.5, optimizer=name), info)
        zero = jax.tree.map(np.zeros_like, params)
        direction, _ = jax.jit(chain.update)(zero, jax.jit(chain.init)(params), params)
        for one, p, d in zip(*map(jax.tree.leaves, (info, params, direction)), strict=True):
            decayed = one.kind in ("state", "matrix")
            np.testing.assert_allclose(d, 0.5 * p if decayed else 0 * p, atol=1e-6)


def test_adamw_is_optaxs(small):
    params, info = small
    config = settings(
        learning_rate=0.01,
        state_learning_rate=0.01,
        weight_decay=0.1,
        schedule="wsd",
        warmup_steps=0,
    )
    ours, theirs = params, params
    chain = optim.make_optimizer(config, info)
    mask = jax.tree.map(lambda one: one.kind in ("state", "matrix"), info)
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(0.01, b1=0.9, b2=0.99, weight_decay=0.1, mask=mask),
    )
    memory, reference_memory = jax.jit(chain.init)(ours), jax.jit(reference.init)(theirs)
    update, reference_update = jax.jit(chain.update), jax.jit(reference.update)
    apply = jax.jit(partial(optim.apply, config, info=info))
    reference_apply = jax.jit(optax.apply_updates)
    for step in range(3):
        grads = jax.tree.map(lambda p: np.sin(np.asarray(p) + np.float32(step)), params)  # noqa: B023
        direction, memory = update(grads, memory, ours)
        ours = apply(ours, direction, jnp.asarray(step))
        updates, reference_memory = reference_update(grads, reference_memory, theirs)
        theirs = reference_apply(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, theirs)


@pytest.mark.parametrize("rule", ["addressed", "broadcast", "dense"])
def test_muon_orthogonalises_each_matrix(rule):
    params, info = build(rule=rule, p_inter=4, core=0, coda=1)
    chain = optim.make_optimizer(settings(optimizer="muon", weight_decay=0.0), info)
    grads = jax.tree.map(lambda p: np.cos(100 * np.asarray(p)), params)
    direction, _ = jax.jit(chain.update)(grads, chain.init(params), params)
    flat = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(direction)
    }
    for path, leaf in flat.items():
        if "coda" not in path or "norm" in path:
            continue
        lead = 2 if "broadcast" in path else 3
        for matrix in np.asarray(leaf).reshape(
            -1, leaf.shape[lead], int(np.prod(leaf.shape[lead + 1 :]))
        ):
            values = np.linalg.svd(matrix, compute_uv=False)
            # Newton-Schulz leaves them between about 0.7 and 1.2
            assert values.max() / values.min() < 3, path
        assert np.sqrt(np.mean(np.square(leaf))) == pytest.approx(0.2, rel=0.01)


@pytest.mark.parametrize("rule", ["metric", "metric_scalar", "tanh"])
def test_muon_knows_the_matrices_of_each_rule(rule):
    synapse = Synapse((SynapsePart("inter", rule, 4, 4, None),), 16, 32, "weights", (0, 1))
    params = jax.jit(synapse.init)(jax.random.key(0), jnp.ones((1, 16)))["params"]
    params = jax.tree.map(lambda p: p[None], params)  # one stage
    info = stacked(describe(synapse, jnp.ones((1, 16))), "stage")
    grads = jax.tree.map(
        lambda p: np.random.default_rng(p.size).standard_normal(p.shape).astype(np.float32), params
    )
    chain = optim.make_optimizer(settings(optimizer="muon", weight_decay=0.0), info)
    direction, _ = jax.jit(chain.update)(grads, chain.init(params), params)
    for (path, step), grad in zip(
        jax.tree_util.tree_leaves_with_path(direction), jax.tree.leaves(grads), strict=True
    ):
        name = path[-1].key
        if name in ("bias", "gain", "offset"):
            # AdamW's first direction is a sign
            np.testing.assert_allclose(np.abs(step), 1, rtol=1e-3)
            continue
        lead = step.ndim - 2 if name == "map" else 3 if rule.startswith("metric") else 2
        shape = (-1, step.shape[lead], int(np.prod(step.shape[lead + 1 :])))
        for found, given in zip(np.reshape(step, shape), np.reshape(grad, shape), strict=True):
            left, _, right = np.linalg.svd(given, full_matrices=False)
            nearest = left @ right
            assert np.sum(found * nearest) > 0.85 * np.linalg.norm(found) * np.linalg.norm(
                nearest
            ), path
