"""The rules: signal and weights agree, with a NumPy loop and with each other; initial scale; gradients."""

import itertools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

import ngc_jax
from ngc_jax.core.rules import GATES, RULES, activation_gain

G, N_IN, N_OUT, DIM = 4, 24, 16, 3
SIGNAL_RULES = ["broadcast", "addressed", "within"]


def states(rule, key=0, groups=G, n_in=N_IN, n_out=N_OUT, dim=DIM):
    return RULES[rule].init(jax.random.key(key), groups, n_in, n_out, dim)


def loop_weights(rule, pre, post):
    """W by the definition in each rule's docstring, one weight at a time."""
    weights = np.zeros((N_OUT, N_IN), np.float64)
    pre, post = np.asarray(pre, np.float64), np.asarray(post, np.float64)
    n, m = N_IN // G, N_OUT // G
    for j, i in itertools.product(range(N_OUT), range(N_IN)):
        (g, jj), (h, ii) = divmod(j, m), divmod(i, n)
        if rule == "broadcast":
            weights[j, i] = sum(post[j, r] * pre[i, r] for r in range(DIM))
        elif rule == "addressed":
            weights[j, i] = sum(post[g, jj, h, p] * pre[h, ii, g, p] for p in range(DIM))
        elif rule == "within" and g == h:
            weights[j, i] = sum(post[g, jj, p] * pre[g, ii, p] for p in range(DIM))
        elif rule == "block" and g == h:
            weights[j, i] = post[g, jj, ii]
    return weights


@pytest.mark.parametrize("rule", RULES)
def test_transmit_and_weights_are_the_numpy_loop(rule):
    pre, post = states(rule)
    x = jax.random.normal(jax.random.key(1), (5, 7, N_IN))
    expected = loop_weights(rule, pre, post)
    np.testing.assert_allclose(ngc_jax.weights(rule, pre, post), expected, atol=1e-6)
    np.testing.assert_allclose(ngc_jax.transmit(rule, x, pre, post), np.asarray(x) @ expected.T, atol=2e-6)
    np.testing.assert_allclose(
        jax.jit(ngc_jax.transmit, static_argnums=0)(rule, x, pre, post),
        ngc_jax.transmit(rule, x, pre, post),
        atol=2e-6,
    )


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("rule", RULES)
def test_activated_signal_is_a_transient_weight(rule, activation):
    pre, post = states(rule)
    for x in jax.random.normal(jax.random.key(2), (4, N_IN)):
        transient = ngc_jax.weights(rule, pre, post, x, activation)
        y = ngc_jax.transmit(rule, x, pre, post, activation)
        np.testing.assert_allclose(y, transient @ x, atol=2e-6)
    other = ngc_jax.weights(rule, pre, post, -x, activation)
    assert not np.allclose(transient, other), "the weight must depend on the token"


def test_gates_are_the_named_activations():
    z = jnp.linspace(-4, 4, 41)
    for name, function in {"silu": jax.nn.silu, "relu": jax.nn.relu}.items():
        np.testing.assert_allclose(z * GATES[name](z), function(z), atol=1e-6)
    np.testing.assert_allclose(z * GATES["gelu"](z), jax.nn.gelu(z, approximate=False), atol=1e-6)


# A block is not activated in a model: its signal is x itself.
@pytest.mark.parametrize(("rule", "activation"), [("block", None), *itertools.product(SIGNAL_RULES, [None, *GATES])])
def test_unit_variance_at_start(rule, activation):
    n_in, n_out, dim = 512, 768, 32
    pre, post = states(rule, groups=8, n_in=n_in, n_out=n_out, dim=dim)
    x = jax.random.normal(jax.random.key(3), (2000, n_in))
    y = ngc_jax.transmit(rule, x, pre, post * activation_gain(activation), activation)
    assert np.var(y) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("rule", RULES)
def test_gradients_agree_with_finite_differences(rule, activation):
    pre, post = states(rule)
    x = jax.random.normal(jax.random.key(4), (3, N_IN))

    def loss(x, pre, post):
        return jnp.sum(jnp.sin(ngc_jax.transmit(rule, x, pre, post, activation)))

    jax.test_util.check_grads(loss, (x, pre, post), order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)


def test_addressed_can_have_full_rank_and_broadcast_cannot():
    assert np.linalg.matrix_rank(ngc_jax.weights("addressed", *states("addressed", dim=1))) == min(N_IN, N_OUT)
    assert np.linalg.matrix_rank(ngc_jax.weights("broadcast", *states("broadcast"))) == DIM


def test_bad_arguments_say_what_is_wrong():
    pre, post = states("broadcast")
    with pytest.raises(KeyError, match="nonsense"):
        ngc_jax.transmit("nonsense", jnp.ones(N_IN), pre, post)
    with pytest.raises(ValueError, match=r"activation='silu'.*\[n_in\]"):
        ngc_jax.weights("broadcast", pre, post, activation="silu")
