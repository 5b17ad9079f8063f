"""The loop: rounds and their measures against NumPy; what its gradient costs in memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from ngc_jax.config import base, model_shape
from ngc_jax.core.communicate import communicate
from ngc_jax.data.batches import token_batch
from ngc_jax.dynamics.measures import summarise
from ngc_jax.nn.decoder import Decoder
from ngc_jax.training.step import losses

B, T, D, R = 2, 3, 8, 5


@pytest.fixture
def loop():
    keys = jax.random.split(jax.random.key(0), 4)
    w = jax.random.normal(keys[0], (D, D)) * 0.3
    start = jax.random.normal(keys[1], (B, T, D))
    keep, drive = jax.random.uniform(keys[2], (D,)), jax.random.uniform(keys[3], (D,))
    return w, start, keep, drive


def run(w, start, keep, drive, **options):
    return communicate(
        lambda x, memory: (jnp.tanh(x @ w), memory),
        start,
        keep=keep,
        drive=drive,
        rounds=R,
        **options,
    )


@pytest.mark.parametrize(("activation", "phi"), [(None, lambda x: x), ("tanh", np.tanh)])
def test_rounds_and_records_are_the_numpy_loop(loop, activation, phi):
    w, start, keep, drive = map(np.asarray, loop)
    states, shares = [start], []
    for _ in range(R):
        x = states[-1]
        added = np.tanh(x @ w)
        states.append(phi(keep * x + drive * start + added))
        driven = np.linalg.norm(drive * start, axis=-1)
        shares.append(np.mean(driven / (driven + np.linalg.norm(added, axis=-1))))
    changes = [np.linalg.norm(b - a, axis=-1) for a, b in itertools.pairwise(states)]
    factors = [np.exp(np.mean(np.log(b / a))) for a, b in itertools.pairwise(changes)]
    growth = [
        np.mean(np.linalg.norm(x, axis=-1) / np.linalg.norm(start, axis=-1)) for x in states[1:]
    ]

    x, _, records = run(*loop, record=True, activation=activation)
    measured = summarise(records)
    np.testing.assert_allclose(x, states[-1], rtol=1e-5, atol=1e-6)
    assert measured["contraction_per_round"] == pytest.approx(
        np.exp(np.mean(np.log(factors))), rel=1e-4
    )
    assert measured["contraction_per_round_max"] == pytest.approx(max(factors), rel=1e-4)
    assert measured["drive_ratio"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert measured["boundedness"] == pytest.approx(max(growth), rel=1e-5)


def test_recording_and_remat_change_nothing(loop):
    plain = run(*loop, remat=False)[0]
    assert run(*loop)[2] is None
    # Equal to rounding: two programs, and the compiler may fuse them differently.
    np.testing.assert_allclose(run(*loop)[0], plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(*loop, record=True)[0], plain, rtol=1e-5, atol=1e-6)
    gradients = [
        jax.grad(lambda w, r=r: jnp.sum(run(w, *loop[1:], remat=r)[0] ** 2))(loop[0])
        for r in (True, False)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-5)


def test_a_known_contraction_is_measured():
    # x <- 0.5 x + e: the step of the state halves each round, whatever the start.
    start = jax.random.normal(jax.random.key(0), (4, D))
    options = {"keep": jnp.full(D, 0.5), "drive": jnp.ones(D), "rounds": 8, "record": True}
    records = communicate(lambda x, memory: (jnp.zeros_like(x), memory), start, **options)[2]
    measured = summarise(records)
    assert measured["contraction_per_round"] == pytest.approx(0.5, rel=1e-4)
    assert measured["drive_ratio"] == pytest.approx(1)
    assert measured["boundedness"] == pytest.approx(2 - 0.5**8, rel=1e-5)


def test_one_round_has_no_contraction(loop):
    w, start, keep, drive = loop
    options = {"keep": keep, "drive": drive, "rounds": 1, "record": True}
    records = communicate(lambda x, memory: (jnp.tanh(x @ w), memory), start, **options)[2]
    assert set(summarise(records)) == {"drive_ratio", "boundedness"}


@pytest.mark.parametrize("form", ["weights", "signals"])
def test_training_memory_grows_by_the_carried_state_alone(form):
    batch, context, width = 4, 32, 64

    def temporary(rounds):
        config = base()
        config.update_from_flattened_dict(TINY)
        config.data.context, config.model.rounds, config.model.form = context, rounds, form
        config.model.width, config.model.hidden, config.model.groups = width, 192, 8
        model = Decoder(model_shape(config, 257))
        params = jax.eval_shape(model.init, jax.random.key(0))

        def loss(params, batch):
            return losses(model, params, batch, jnp.float32)[0].mean()

        compiled = jax.jit(jax.grad(loss)).lower(params, token_batch(batch, context)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    carried = batch * context * width * 4
    eight, sixteen, thirty_two = (temporary(rounds) for rounds in (8, 16, 32))
    assert sixteen - eight == pytest.approx(8 * carried, abs=1024)
    assert thirty_two - sixteen == pytest.approx(16 * carried, abs=1024)
