"""Lyapunov kernels: known systems, explicit Jacobians, memory and cost that do not grow, and clear
refusals.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax import count
from ngc_jax.dynamics.lyapunov import (
    bootstrap_interval,
    entropy_rate,
    kaplan_yorke_dimension,
    leading_exponent,
    local_exponents,
    lyapunov_spectrum,
    orthonormalise,
    unresolved,
)


def rotation(n, seed=0):
    return jnp.linalg.qr(jax.random.normal(jax.random.key(seed), (n, n)))[0]


def lorenz(x, u, dt=0.01):
    def flow(x):
        return jnp.stack(
            [10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]]
        )

    a = flow(x)
    b = flow(x + dt / 2 * a)
    c = flow(x + dt / 2 * b)
    d = flow(x + dt * c)
    return x + dt / 6 * (a + 2 * b + 2 * c + d)


def logistic(x, u):
    return 4 * x * (1 - x)


def henon(x, u):
    return jnp.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def test_diagonal_and_rotated_linear_maps():
    rates = jnp.array([1.5, 0.9, 0.5, 0.1])
    basis = rotation(4)
    maps = {"diagonal": jnp.diag(rates), "rotated": basis @ jnp.diag(rates) @ basis.T}
    for name, a in maps.items():
        found = lyapunov_spectrum(lambda x, u, a=a: a @ x, jnp.zeros(4), steps=200, transient=100)
        np.testing.assert_allclose(found, jnp.log(rates), atol=1e-5, err_msg=name)


def test_logistic_map():
    assert float(
        leading_exponent(logistic, jnp.array(0.3), steps=50_000, transient=100)
    ) == pytest.approx(np.log(2), abs=0.01)


def test_henon_map_its_dimension_and_its_entropy():
    found = lyapunov_spectrum(henon, jnp.array([0.1, 0.1]), steps=30_000, transient=100)
    np.testing.assert_allclose(found, [0.419, -1.623], atol=0.01)
    assert float(kaplan_yorke_dimension(found)) == pytest.approx(1.258, abs=0.01)
    assert float(entropy_rate(found)) == pytest.approx(0.419, abs=0.01)


@pytest.mark.slow
def test_lorenz_system():
    found = (
        lyapunov_spectrum(lorenz, jnp.ones(3), steps=200_000, transient=2_000, qr_every=5) / 0.01
    )
    np.testing.assert_allclose(found, [0.905, 0, -14.572], atol=0.02)


def test_orthogonal_recurrence_has_no_exponents():
    q = rotation(8, seed=1)
    found = lyapunov_spectrum(lambda x, u: q @ x, jnp.ones(8), steps=5_000)
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_driven_contracting_system():
    """x <- tanh(x + u)/2 around inputs that hold x at chosen points: the conditional exponent in
    closed form.
    """
    points = jax.random.uniform(jax.random.key(0), (401,), minval=-0.4, maxval=0.4)
    inputs = jnp.arctanh(2 * points[1:]) - points[:-1]
    slopes = 0.5 * (1 - jnp.square(2 * points[1:]))
    found = leading_exponent(lambda x, u: 0.5 * jnp.tanh(x + u), points[0], inputs, steps=400)
    assert float(found) == pytest.approx(float(jnp.mean(jnp.log(slopes))), abs=1e-4)


def test_states_may_be_trees_of_any_shape():
    def step(x, u):
        return {"a": 0.5 * x["a"] + u, "b": x["b"].at[0, 0].multiply(0.25)}

    x0 = {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 2))}
    found = lyapunov_spectrum(step, x0, jnp.ones(60), steps=40, transient=20)
    np.testing.assert_allclose(found, np.log([1, 0.5, 0.5, 0.25]), atol=1e-5)


def test_a_lost_direction_is_minus_infinity_and_no_nan():
    found = lyapunov_spectrum(
        lambda x, u: x * jnp.array([0.5, 0.0]), jnp.ones(2), steps=60, transient=5
    )
    np.testing.assert_allclose(found[0], np.log(0.5), atol=1e-5)
    assert found[1] == -jnp.inf


def test_tall_tangents_are_orthonormalised_as_by_qr():
    """By Gram matrices, also where the rows are all but one, or lack a direction altogether."""
    basis = jax.random.normal(jax.random.key(0), (5, 400))
    mixed = jnp.array(
        [
            [1.0, 0, 0, 0, 0],
            [1, 1e-3, 0, 0, 0],
            [1, 1, 1e-2, 0, 0],
            [0, 1, 1, 1, 0],
            [1, 1, 1, 1, 1e-4],
        ]
    )
    rows, growth = orthonormalise(mixed @ basis)
    np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-3)
    r = np.linalg.qr(np.asarray(mixed @ basis, np.float64).T, mode="r")
    np.testing.assert_allclose(growth, np.log(np.abs(np.diag(r))), atol=1e-2)
    rows, growth = orthonormalise(basis.at[3].set(0))
    assert growth[3] == -jnp.inf
    assert bool(jnp.all(jnp.isfinite(rows)))
    assert bool(jnp.all(jnp.isfinite(jnp.delete(growth, 3))))


@pytest.mark.parametrize("n", [2, 60, 3000])
def test_a_direction_that_a_step_loses_is_minus_infinity_in_any_size(n):
    kept = jnp.zeros(n).at[0].set(0.5)
    found = lyapunov_spectrum(lambda x, u: kept * x, jnp.ones(n), steps=20, transient=5, k=2)
    np.testing.assert_allclose(found, [np.log(0.5), -np.inf], atol=1e-5)


def test_rows_that_are_one_up_to_rounding_are_still_made_finite():
    """Of 2,000 numbers, where rounding in the Gram matrix is larger than in one of a few."""
    rng = np.random.default_rng(0)
    direction, noise = rng.standard_normal((2, 2000))
    for size in (1e-7, 1e-5, 1e-3):
        rows, growth = orthonormalise(
            jnp.asarray(np.outer([1, -2, 0.3], direction) + size * np.outer([1, 1, -1], noise))
        )
        assert bool(jnp.all(jnp.isfinite(rows)))
        assert not bool(jnp.any(jnp.isnan(growth)))


def in_float64(a, k, steps, transient):
    """The k largest exponents of x <- a x, by NumPy's QR in float64."""
    q = np.linalg.qr(np.random.default_rng(1).standard_normal((len(a), k)))[0]
    logs = []
    for _ in range(steps + transient):
        q, r = np.linalg.qr(a @ q)
        logs.append(np.log(np.abs(np.diag(r))))
    return -np.sort(-np.mean(logs[transient:], axis=0))


@pytest.mark.parametrize("n", [12, 200])
def test_exponents_below_what_float32_resolves_are_named(n):
    """And all others agree with float64; 3 directions are followed, the third ever smaller."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((n, n)))[0]
    for gap, resolved in ((3, True), (9, True), (20, False), (30, False)):
        rates = np.full(n, np.exp(-gap - 1.0))
        rates[:3] = 1, 0.5, np.exp(-gap)
        a = (basis * rates) @ basis.T
        exact = in_float64(a, 3, steps=60, transient=20)
        a = jnp.asarray(a, jnp.float32)
        measure = partial(lyapunov_spectrum, lambda x, u, a=a: a @ x, steps=60, transient=20, k=3)
        if resolved:
            with warnings.catch_warnings(action="error"):
                found = measure(jnp.zeros(n))
        else:
            with pytest.warns(UserWarning, match=r"1 of 3 exponents are too small .* for float32"):
                found = measure(jnp.zeros(n))
        assert unresolved(found).tolist() == [False, False, not resolved]
        kept = ~np.asarray(unresolved(found))
        np.testing.assert_allclose(found[kept], exact[kept], atol=0.06)
        # Rounding error is not the truth: this is why it is named.
        assert resolved or abs(found[2] - exact[2]) > 1


def test_a_step_of_many_resolves_less_each():
    exponents = jnp.array([[0.0, -4.0, -jnp.inf], [0.0, -6.0, -11.0]])
    assert unresolved(exponents).tolist() == [[False] * 3, [False, False, True]]
    assert unresolved(exponents, qr_every=2).tolist() == [[False] * 3, [False, True, True]]


def test_a_large_state_has_the_exponents_of_its_parts():
    rates = jnp.concatenate([jnp.array([1.2, 0.9, 0.4]), jnp.full(400, 1e-3)])
    found = lyapunov_spectrum(lambda x, u: rates * x, jnp.zeros(403), steps=60, transient=40, k=3)
    np.testing.assert_allclose(found, jnp.log(rates[:3]), atol=1e-5)


def test_orthonormalising_seldom_changes_nothing_but_the_cost():
    x0 = jnp.array([0.1, 0.1])
    often, seldom = (
        lyapunov_spectrum(henon, x0, steps=4_000, transient=40, qr_every=q) for q in (1, 4)
    )
    np.testing.assert_allclose(often, seldom, atol=1e-3)


def test_blocks_average_to_the_spectrum_and_carry_its_interval():
    x0 = jnp.array([0.1, 0.1])
    blocks = local_exponents(henon, x0, steps=20_000, blocks=40, transient=40)
    whole = lyapunov_spectrum(henon, x0, steps=20_000, transient=40)
    np.testing.assert_allclose(jnp.mean(blocks, axis=0), whole, atol=1e-4)
    low, high = bootstrap_interval(blocks)
    assert bool(jnp.all((low < whole) & (whole < high)))
    assert float(low[0]) < 0.419 < float(high[0]) < 0.45


def test_the_interval_covers_as_often_as_it_says():
    samples = jax.random.normal(jax.random.key(0), (400, 30))
    interval = jax.vmap(lambda row, key: bootstrap_interval(row, resamples=500, key=key))
    low, high = jax.jit(interval)(samples, jax.random.split(jax.random.key(1), 400))
    assert 0.88 < np.mean((low < 0) & (high > 0)) < 0.98


def test_derived_numbers():
    assert float(kaplan_yorke_dimension(jnp.array([0.905, 0, -14.572]))) == pytest.approx(
        2.062, abs=1e-3
    )
    assert float(kaplan_yorke_dimension(jnp.array([-0.1, -1.0]))) == 0
    assert float(kaplan_yorke_dimension(jnp.array([0.3, 0.1]))) == 2
    assert float(kaplan_yorke_dimension(jnp.array([0.3, -jnp.inf]))) == 1
    assert float(entropy_rate(jnp.array([0.3, 0.1, -2]))) == pytest.approx(0.4)


def test_leading_exponent_has_a_gradient():
    gradient = jax.grad(lambda a: leading_exponent(lambda x, u: a * x, jnp.ones(3), steps=20))(2.0)
    assert float(gradient) == pytest.approx(0.5, rel=1e-5)  # d log a / d a


def test_many_starts_at_once():
    starts = jnp.array([0.11, 0.27, 0.35])
    together = jax.vmap(lambda x: leading_exponent(logistic, x, steps=500))(starts)
    alone = [leading_exponent(logistic, x, steps=500) for x in starts]
    np.testing.assert_allclose(together, jnp.stack(alone), atol=1e-4)


W = jax.random.normal(jax.random.key(3), (256, 256)) / 16


def recurrent(x, u):
    return jnp.tanh(W @ x)


def test_memory_does_not_grow_with_steps():
    def temporary(steps):
        run = jax.jit(lambda x: lyapunov_spectrum(recurrent, x, steps=steps, k=4))
        return run.lower(jnp.zeros(256)).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1024) <= 1.1 * temporary(64)


def test_cost_is_that_of_one_tangent_for_each_exponent():
    """In counted FLOPs of products, to which QR adds what it does; `benchmarks/exponents.py` takes
    the time.
    """

    def steps_of(x):
        return jax.lax.scan(lambda x, _: (recurrent(x, None), None), x, length=10)[0]

    forward = count.forward_flops(steps_of, jnp.zeros(256))
    one = count.forward_flops(lambda x: leading_exponent(recurrent, x, steps=10), jnp.zeros(256))
    four = count.forward_flops(
        lambda x: lyapunov_spectrum(recurrent, x, steps=10, k=4), jnp.zeros(256)
    )
    assert one <= 2.2 * forward
    assert four <= 5.5 * forward


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"k": 4}, "k=4: must be from 1 to 3"),
        ({"k": 0}, "k=0"),
        ({"steps": 0}, "steps=0"),
        ({"transient": -1}, "transient=-1"),
        ({"qr_every": 0}, "qr_every=0"),
        ({"qr_every": 3}, "qr_every=3: must divide the 10 steps of a block, for instance 2"),
        ({"step": lambda x, u: x[:2]}, "step: makes float32[2] of float32[3]"),
        ({"step": lambda x, u: x.astype(jnp.bfloat16)}, "step: makes bfloat16[3] of float32[3]"),
        ({"step": lambda x, u: (x, x)}, "step: makes ('float32[3]', 'float32[3]') of float32[3]"),
        ({"x0": jnp.array([1, 2, 3])}, "x0: dtype int32"),
        ({"x0": jnp.array([1.0, jnp.nan, 2.0])}, "x0: not finite"),
        (
            {"x0": jnp.array([1.0, 2.0, 1e20]), "step": lambda x, u: x * x},
            "x0: the state stopped being finite in step",
        ),
        (
            {"inputs": jnp.zeros((9, 3))},
            "inputs: shape (9, 3); the leading axis must have transient + steps = 10",
        ),
        (
            {"step": lambda x, u: 1e20 * x, "x0": jnp.zeros(3), "qr_every": 5},
            "qr_every=5: take fewer",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(wrong, named):
    arguments = {"step": lambda x, u: 0.5 * x, "x0": jnp.ones(3), "steps": 10, **wrong}
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the message is what is tested)
        lyapunov_spectrum(**arguments)
    assert named in str(refusal.value)


def test_a_state_that_blows_up_inside_vmap_is_nan_and_leaves_the_others():
    found = jax.vmap(lambda x: leading_exponent(lambda x, u: x * x, x, steps=8))(
        jnp.array([0.999, 9.0])
    )
    assert bool(jnp.isfinite(found[0]))
    assert bool(jnp.isnan(found[1]))
