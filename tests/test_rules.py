"""The rules: signal and weights agree, with a NumPy loop and with each other; initial scale;
gradients; size.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from conftest import shaken

import ngc_jax
from ngc_jax.core.rules import GATES, INSIDE, RULES, SIGNAL_RULES, activation_gain

G, N_IN, N_OUT, DIM = 4, 24, 16, 3
GENERATED = [rule for rule in RULES if rule not in SIGNAL_RULES]


def states(rule, key=0, groups=G, n_in=N_IN, n_out=N_OUT, dim=DIM):
    init = partial(RULES[rule].init, groups=groups, n_in=n_in, n_out=n_out, dim=dim)
    return jax.jit(init)(jax.random.key(key))


def loop_weight(rule, pre, post, j, i):
    """W[j, i] by the definition in each rule's docstring."""
    (g, jj), (h, ii) = divmod(j, N_OUT // G), divmod(i, N_IN // G)
    numbers, scale = range(DIM), N_IN**-0.5
    if rule == "broadcast":
        return sum(post[j, r] * pre[i, r] for r in numbers)
    if rule == "addressed":
        return sum(post[g, jj, h, p] * pre[h, ii, g, p] for p in numbers)
    if rule == "within":
        return sum(post[g, jj, p] * pre[g, ii, p] for p in numbers) if g == h else 0
    if rule == "block":
        return post[g, jj, ii] if g == h else 0
    if rule == "metric":
        pairs = itertools.product(numbers, numbers)
        return sum(
            post["state"][g, jj, p] * post["map"][g, h, p, q] * pre[h, ii, q] for p, q in pairs
        )
    if rule == "metric_diagonal":
        return sum(post["state"][g, jj, p] * post["map"][g, h, p] * pre[h, ii, p] for p in numbers)
    if rule == "metric_scalar":
        return post["map"][g, h] * sum(post["state"][g, jj, p] * pre[h, ii, p] for p in numbers)
    if rule == "tanh":

        def feature(side, neuron, f):
            return np.tanh(
                sum(side["state"][neuron, r] * side["map"][r, f] for r in numbers) + side["bias"][f]
            )

        return scale * sum(
            post["gain"][f] * feature(post, j, f) * feature(pre, i, f) for f in range(4 * DIM)
        )
    R = post["state"][j]
    if rule == "shift":
        q = [sum(R[r] * pre[i, (r - k) % DIM] for r in numbers) / np.sqrt(DIM) for k in (0, 2, 4)]
        c = post["gain"]
        return scale * (c[0] * q[0] + c[1] * np.tanh(q[1]) + c[2] * np.tanh(q[2]))
    if rule == "riemannian":
        total = post["offset"]
        for k, f in itertools.product(range(6), range(post["gain"].size)):
            A = post["map"][k, f]
            inside = sum(A[r] * (pre[i, r] + R[(r - k) % DIM]) for r in numbers)
            total = total + post["gain"][f] * np.tanh(inside + post["bias"][k, f])
        return scale * total
    d = [abs(pre[i, h] - R[h]) for h in numbers]
    return scale * sum(
        post["gain"][h] * (1 - 4.5 * d[h] ** 2) * np.exp(-2 * d[h] ** 2) for h in numbers
    )


@pytest.mark.parametrize("rule", RULES)
def test_transmit_and_weights_are_the_numpy_loop(rule):
    pre, post = shaken(states(rule))
    x = jax.random.normal(jax.random.key(1), (5, 7, N_IN))
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), (pre, post))
    expected = np.array(
        [[loop_weight(rule, *wide, j, i) for i in range(N_IN)] for j in range(N_OUT)]
    )
    np.testing.assert_allclose(
        jax.jit(partial(ngc_jax.weights, rule))(pre, post), expected, atol=2e-6
    )
    y = ngc_jax.transmit(rule, x, pre, post)
    np.testing.assert_allclose(y, np.asarray(x) @ expected.T, atol=5e-6)
    np.testing.assert_allclose(jax.jit(partial(ngc_jax.transmit, rule))(x, pre, post), y, atol=5e-6)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("rule", SIGNAL_RULES)
def test_activated_signal_is_a_transient_weight(rule, activation):
    pre, post = shaken(states(rule))
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
ACTIVATED = [(rule, "silu") for rule in SIGNAL_RULES if rule not in ("broadcast", "block")]


@pytest.mark.parametrize(
    ("rule", "activation"),
    [*((rule, None) for rule in RULES), *(("broadcast", gate) for gate in GATES), *ACTIVATED],
)
def test_unit_variance_at_start(rule, activation):
    n_in, n_out, dim = 512, 768, 32 if rule in SIGNAL_RULES else 4
    pre, post = states(rule, groups=8, n_in=n_in, n_out=n_out, dim=dim)
    x = jax.random.normal(jax.random.key(3), (2000, n_in))
    post = RULES[rule].scaled(post, activation_gain(activation))
    y = jax.jit(partial(ngc_jax.transmit, rule, activation=activation))(x, pre, post)
    assert np.var(y) == pytest.approx(1, abs=0.1)


@pytest.fixture(scope="module")
def in_two_kinds():
    """W [N_OUT, N_IN] of each rule, with the senders of each group in two kinds."""
    kind = jnp.arange(N_IN // G) % 2

    def draw(key):
        drawn = {rule: RULES[rule].init(key, G, N_IN, N_OUT, 2 * DIM) for rule in RULES}
        return {
            rule: ngc_jax.weights(rule, *RULES[rule].alike(*states, kind))
            for rule, states in drawn.items()
        }

    return jax.jit(draw)(jax.random.key(0))


@pytest.mark.parametrize("rule", RULES)
def test_senders_in_kinds_make_weights_of_that_rank_and_the_usual_variance(rule, in_two_kinds):
    w = np.asarray(in_two_kinds[rule])
    by_group = w.reshape(N_OUT, G, N_IN // G)
    np.testing.assert_allclose(by_group[:, :, 2:], by_group[:, :, :-2], atol=1e-6)
    assert np.linalg.matrix_rank(w, rtol=1e-5) == min(
        2 * G, 2 * DIM if rule == "broadcast" else N_OUT
    )
    np.testing.assert_allclose(N_IN * np.mean(np.square(w)), 1, rtol=1e-3)


def test_senders_in_kinds_speak_as_loudly():
    rule = RULES["broadcast"]
    pre, post = rule.alike(*states("broadcast", n_in=128, n_out=256, dim=16), jnp.arange(16) % 2)
    x = jax.random.normal(jax.random.key(3), (2000, 128))
    y = jax.jit(partial(ngc_jax.transmit, "broadcast", activation="silu"))(
        x, pre, rule.scaled(post, activation_gain("silu"))
    )
    assert np.var(y) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rule", GENERATED)
def test_generated_weights_start_with_the_variance_they_should_have(rule):
    for dim in (1, 3):

        def draw(key, dim=dim):
            return ngc_jax.weights(rule, *RULES[rule].init(key, 1, 256, 384, dim))

        weights = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 3)))
        np.testing.assert_allclose(256 * np.mean(weights**2, axis=(1, 2)), 1, rtol=1e-3)
        assert np.all(np.mean(weights, axis=(1, 2)) ** 2 < 0.05 / 256)


@pytest.mark.parametrize("rule", RULES)
def test_scaled_states_make_scaled_weights_and_zero_states_none(rule):
    pre, post = shaken(states(rule))
    half = ngc_jax.weights(rule, pre, RULES[rule].scaled(post, 0.5))
    np.testing.assert_allclose(half, 0.5 * ngc_jax.weights(rule, pre, post), atol=1e-6)
    assert not np.any(ngc_jax.weights(rule, pre, jax.tree.map(jnp.zeros_like, post)))


@pytest.mark.parametrize(
    ("rule", "activation"),
    [*((rule, None) for rule in RULES), *((rule, "silu") for rule in SIGNAL_RULES)],
)
def test_gradients_agree_with_finite_differences(rule, activation):
    pre, post = shaken(states(rule))
    x = jax.random.normal(jax.random.key(4), (3, N_IN))

    @jax.jit
    def loss(x, pre, post):
        return jnp.sum(jnp.sin(ngc_jax.transmit(rule, x, pre, post, activation)))

    jax.test_util.check_grads(
        loss, (x, pre, post), order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2
    )


PARAMETERS = {  # as in the docstrings
    "addressed": DIM * G * (N_IN + N_OUT),
    "broadcast": DIM * (N_IN + N_OUT),
    "metric": DIM * (N_IN + N_OUT) + G**2 * DIM**2,
    "metric_diagonal": DIM * (N_IN + N_OUT) + G**2 * DIM,
    "metric_scalar": DIM * (N_IN + N_OUT) + G**2,
    "tanh": DIM * (N_IN + N_OUT) + 8 * DIM**2 + 12 * DIM,
    "shift": DIM * (N_IN + N_OUT) + 3,
    "riemannian": DIM * (N_IN + N_OUT) + 6 * 4 * DIM + 7 * 4 + 1,
    "distance": DIM * (N_IN + N_OUT) + DIM,
    "within": DIM * (N_IN + N_OUT),
    "block": N_IN * N_OUT // G,
}
RANK = dict.fromkeys(RULES, min(N_IN, N_OUT)) | {
    "broadcast": DIM,
    "tanh": 4 * DIM,
    "within": G * DIM,
}
RANK |= {rule: min(N_OUT, G * DIM) for rule in RULES if rule.startswith("metric")}


@pytest.mark.parametrize("rule", RULES)
def test_parameters_and_rank_are_what_the_docstrings_say(rule):
    pre, post = shaken(states(rule))
    assert sum(leaf.size for leaf in jax.tree.leaves((pre, post))) == PARAMETERS[rule]
    assert np.linalg.matrix_rank(ngc_jax.weights(rule, pre, post), rtol=1e-5) == RANK[rule]


def test_addressed_has_full_rank_with_one_number_a_port():
    assert np.linalg.matrix_rank(ngc_jax.weights("addressed", *states("addressed", dim=1))) == min(
        N_IN, N_OUT
    )


def test_bad_arguments_say_what_is_wrong():
    pre, post = states("broadcast")
    with pytest.raises(KeyError, match="nonsense"):
        ngc_jax.transmit("nonsense", jnp.ones(N_IN), pre, post)
    with pytest.raises(ValueError, match=r"activation='silu'.*\[n_in\]"):
        ngc_jax.weights("broadcast", pre, post, activation="silu")


@pytest.mark.parametrize("rule", GENERATED)
def test_a_generated_rule_refuses_an_activation(rule):
    pre, post = states(rule)
    named = f"rule='{rule}': .* addressed, broadcast, metric"
    with pytest.raises(ValueError, match=named):
        ngc_jax.transmit(rule, jnp.ones(N_IN), pre, post, "silu")
    with pytest.raises(ValueError, match=named):
        ngc_jax.weights(rule, pre, post, jnp.ones(N_IN), "silu")


def test_rules_between_groups_join_all_neurons():
    for rule in set(RULES) - set(INSIDE):
        assert np.all(ngc_jax.weights(rule, *states(rule)) != 0), rule
