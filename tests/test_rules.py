"""The rules: signal and weights agree, with a NumPy loop and with each other; initial scale;
gradients; size; what is refused.
"""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from conftest import shaken

import ngc_jax
from ngc_jax.core.rules import GATES, RULES, SignalRule, activation_gain, emit
from ngc_jax.core.rules.addressed import Addressed, Rewirable
from ngc_jax.core.wiring import WIRINGS

G, N_IN, N_OUT, DIM = 4, 24, 16, 3
SIGNAL_RULES = [name for name, rule in RULES.items() if isinstance(rule, SignalRule)]
GENERATED = [name for name in RULES if name not in SIGNAL_RULES]
X = jax.random.normal(jax.random.key(1), (5, 7, N_IN))


@functools.cache
def begun():
    """{rule: (pre, post, W)} at the start. All rules in one program, which compiles soonest."""

    def draw(key):
        drawn = {name: rule.init(key, G, N_IN, N_OUT, DIM) for name, rule in RULES.items()}
        return {name: (*states, ngc_jax.weights(name, *states)) for name, states in drawn.items()}

    return jax.jit(draw)(jax.random.key(0))


def states(rule):
    """(pre, post) away from the special values of their start."""
    return shaken(begun()[rule][:2])


@functools.cache
def made():
    """What each rule makes of `states`: W; y of X; W of half the scale; W of post states of 0."""

    def run(states, x):
        return {
            name: (
                ngc_jax.weights(name, pre, post),
                ngc_jax.transmit(name, x, pre, post),
                ngc_jax.weights(name, pre, RULES[name].scaled(post, 0.5)),
                ngc_jax.weights(name, pre, jax.tree.map(jnp.zeros_like, post)),
            )
            for name, (pre, post) in states.items()
        }

    return jax.jit(run)({name: states(name) for name in RULES}, X)


def loop_weight(rule, pre, post, j, i):
    """W[j, i] by the definition in each rule's docstring."""
    (g, jj), (h, ii) = divmod(j, N_OUT // G), divmod(i, N_IN // G)
    numbers, scale = range(DIM), N_IN**-0.5
    if rule == "broadcast":
        return sum(post[j, r] * pre[i, r] for r in numbers)
    if rule == "leaders":
        at = post["order"][j].astype(int)
        if at < DIM:
            return post["gain"] * pre[at, i]
        return post["gain"] * sum(post["state"][at - DIM, r] * pre[r, i] for r in numbers)
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
            inside = post["map"][k, f] @ (pre[i] + [R[(r - k) % DIM] for r in numbers])
            total = total + post["gain"][f] * np.tanh(inside + post["bias"][k, f])
        return scale * total
    d = [abs(pre[i, h] - R[h]) for h in numbers]
    return scale * sum(
        post["gain"][h] * (1 - 4.5 * d[h] ** 2) * np.exp(-2 * d[h] ** 2) for h in numbers
    )


@pytest.mark.parametrize("rule", RULES)
def test_transmit_and_weights_are_the_numpy_loop(rule):
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), states(rule))
    expected = np.array(
        [[loop_weight(rule, *wide, j, i) for i in range(N_IN)] for j in range(N_OUT)]
    )
    formed, y = made()[rule][:2]
    np.testing.assert_allclose(formed, expected, atol=2e-6)
    np.testing.assert_allclose(y, np.asarray(X) @ expected.T, atol=5e-6)


@pytest.mark.parametrize("rule", ["addressed", "shift"])
def test_one_operation_at_a_time_gives_the_same(rule):
    formed, y = made()[rule][:2]
    np.testing.assert_allclose(ngc_jax.transmit(rule, X, *states(rule)), y, atol=5e-6)
    np.testing.assert_allclose(ngc_jax.weights(rule, *states(rule)), formed, atol=2e-6)


@pytest.mark.parametrize("rule", SIGNAL_RULES)
def test_activated_signal_is_a_transient_weight(rule):
    @jax.jit
    def run(pre, post, x):
        """{activation: (W(x), y)} for each x [N_IN]."""

        def one(gate, x):
            formed = ngc_jax.weights(rule, pre, post, x, gate)
            return formed, ngc_jax.transmit(rule, x, pre, post, gate)

        return {gate: jax.vmap(partial(one, gate))(x) for gate in GATES}

    x = jax.random.normal(jax.random.key(2), (4, N_IN))
    for gate, (transient, y) in run(*states(rule), jnp.concatenate([x, -x])).items():
        np.testing.assert_allclose(
            y[:4], np.einsum("tji,ti->tj", transient[:4], x), atol=2e-6, err_msg=gate
        )
        assert not np.allclose(transient[:4], transient[4:]), "W must depend on the token"


def test_gates_are_the_named_activations():
    z = jnp.linspace(-4, 4, 41)
    for name, function in {"silu": jax.nn.silu, "relu": jax.nn.relu}.items():
        np.testing.assert_allclose(z * GATES[name](z), function(z), atol=1e-6)
    np.testing.assert_allclose(z * GATES["gelu"](z), jax.nn.gelu(z, approximate=False), atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_unit_variance_at_start(rule):
    n_in, n_out, dim = 512, 768, 32 if rule in SIGNAL_RULES else 4
    gates = [] if rule in GENERATED else [*GATES] if rule == "broadcast" else ["silu"]
    if rule == "block":  # it is not activated in a model: its signal is x itself
        gates = []

    @jax.jit
    def variances(key, x):
        pre, post = RULES[rule].init(key, 8, n_in, n_out, dim)
        found = {}
        for gate in [None, *gates]:
            scaled = RULES[rule].scaled(post, activation_gain(gate))
            found[str(gate)] = jnp.var(ngc_jax.transmit(rule, x, pre, scaled, gate))
        return found

    found = variances(jax.random.key(0), jax.random.normal(jax.random.key(3), (2000, n_in)))
    assert found == pytest.approx(dict.fromkeys(found, 1), abs=0.1)


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
        2 * G, 2 * DIM if rule in ("broadcast", "leaders") else N_OUT
    )
    np.testing.assert_allclose(N_IN * np.mean(np.square(w)), 1, rtol=1e-3)


def test_senders_in_kinds_speak_as_loudly():
    rule = RULES["broadcast"]

    @jax.jit
    def variance(key, x):
        pre, post = rule.alike(*rule.init(key, 8, 128, 256, 16), jnp.arange(16) % 2)
        post = rule.scaled(post, activation_gain("silu"))
        return jnp.var(ngc_jax.transmit("broadcast", x, pre, post, "silu"))

    x = jax.random.normal(jax.random.key(3), (2000, 128))
    assert variance(jax.random.key(0), x) == pytest.approx(1, abs=0.15)


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
    formed, _, half, none = made()[rule]
    np.testing.assert_allclose(half, 0.5 * formed, atol=1e-6)
    assert not np.any(none)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_agree_with_finite_differences(rule):
    pre, post = states(rule)
    order = {"order": post.pop("order")} if rule == "leaders" else {}  # no number to differentiate
    x = jax.random.normal(jax.random.key(4), (3, N_IN))
    gates = [None, "silu"] if rule in SIGNAL_RULES else [None]

    @jax.jit
    def losses(x, pre, post):
        post = post | order if order else post
        return [jnp.sum(jnp.sin(ngc_jax.transmit(rule, x, pre, post, gate))) for gate in gates]

    jax.test_util.check_grads(
        losses, (x, pre, post), order=1, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2
    )


PARAMETERS = {  # as in the docstrings
    "addressed": DIM * G * (N_IN + N_OUT),
    "broadcast": DIM * (N_IN + N_OUT),
    "leaders": DIM * (N_IN + N_OUT - DIM) + 1,
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
    "leaders": DIM,
    "tanh": 4 * DIM,
    "within": G * DIM,
}
RANK |= {rule: min(N_OUT, G * DIM) for rule in RULES if rule.startswith("metric")}


@pytest.mark.parametrize("rule", RULES)
def test_parameters_and_rank_are_what_the_docstrings_say(rule):
    leaves = jax.tree.leaves(states(rule))
    assert sum(a.size for a in leaves if a.dtype.kind == "f") == PARAMETERS[rule]
    assert np.linalg.matrix_rank(made()[rule][0], rtol=1e-5) == RANK[rule]


def test_addressed_has_full_rank_with_one_number_a_port():
    pre, post = RULES["addressed"].init(jax.random.key(0), G, N_IN, N_OUT, 1)
    assert np.linalg.matrix_rank(ngc_jax.weights("addressed", pre, post)) == min(N_IN, N_OUT)


def test_rules_between_groups_join_all_neurons():
    for name, rule in RULES.items():
        assert rule.inside or np.all(begun()[name][2] != 0), name


# ---- Refusals ----


def test_unknown_names_list_those_that_there_are():
    pre, post = states("broadcast")
    with pytest.raises(KeyError, match=r"rule='nonsense': must be one of addressed, broadcast, l"):
        ngc_jax.transmit("nonsense", jnp.ones(N_IN), pre, post)
    with pytest.raises(KeyError, match=r"activation='sliu': must be one of silu, gelu, relu"):
        ngc_jax.transmit("broadcast", jnp.ones(N_IN), pre, post, "sliu")


def test_a_transient_weight_is_one_tokens():
    with pytest.raises(ValueError, match=r"activation='silu'.*\[n_in\]"):
        ngc_jax.weights("broadcast", *states("broadcast"), activation="silu")


@pytest.mark.parametrize("rule", GENERATED)
def test_a_generated_rule_refuses_an_activation(rule):
    pre, post = states(rule)
    named = f"rule='{rule}': .* addressed, broadcast, leaders, metric"
    with pytest.raises(ValueError, match=named):
        ngc_jax.transmit(rule, jnp.ones(N_IN), pre, post, "silu")
    with pytest.raises(ValueError, match=named):
        ngc_jax.weights(rule, pre, post, jnp.ones(N_IN), "silu")


RING = Addressed(WIRINGS["ring"](G, 2, 0))
GROUPED = {name: rule for name, rule in RULES.items() if rule.grouped}
GROUPED |= {"ring": RING, "rewirable": Rewirable(2)}


@pytest.mark.parametrize("rule", GROUPED)
def test_groups_that_do_not_divide_the_neurons_are_refused(rule):
    wanted = r"groups=4: must divide n_in=10 and n_out=15, for instance groups=1"
    with pytest.raises(ValueError, match=wanted):
        GROUPED[rule].init(jax.random.key(0), 4, 10, 15, 2)
    with pytest.raises(ValueError, match=r"groups=5: .* n_in=12 and n_out=20, .* groups=4"):
        GROUPED[rule].init(jax.random.key(0), 5, 12, 20, 2)
    with pytest.raises(ValueError, match=r"groups=0: .* groups=1"):
        GROUPED[rule].init(jax.random.key(0), 0, 10, 15, 2)


def test_a_wiring_is_one_of_so_many_groups():
    with pytest.raises(ValueError, match="groups=8: the wiring is one of 4 groups"):
        RING.init(jax.random.key(0), 8, 24, 16, 2)


@pytest.mark.parametrize("rule", [r for r in RULES if RULES[r].grouped and r != "block"])
def test_states_of_different_numbers_of_groups_are_refused(rule):
    """One group's states, above all, which a product would broadcast. (A block has no pre.)"""
    one, four = (RULES[rule].init(jax.random.key(0), g, N_IN, N_OUT, DIM) for g in (1, G))
    for pre, post in ((one[0], four[1]), (four[0], one[1])):
        for call in (
            partial(ngc_jax.transmit, rule, jnp.ones(N_IN)),
            partial(ngc_jax.weights, rule),
        ):
            with pytest.raises(ValueError, match=r"pre, post: of . and . groups; must be of equ"):
                call(pre, post)


@pytest.mark.parametrize("size", [G, N_OUT, N_IN + G, None])
@pytest.mark.parametrize("rule", [*RULES, "ring", "rewirable"])
def test_an_input_of_another_size_is_refused(rule, size):
    """One number a group, above all, which a product of groups would broadcast."""
    how = GROUPED.get(rule, rule)
    pre, post = states(rule) if rule in RULES else how.init(jax.random.key(0), G, N_IN, N_OUT, 2)
    shape = () if size is None else (3, size)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    named = rf"x: shape \{[*shape]}; must be \[..., {N_IN}\]"
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(partial(ngc_jax.transmit, how), x, pre, post)
    if rule in GENERATED:
        return
    if rule != "block":  # whose pre says nothing: its signal is x itself
        with pytest.raises(ValueError, match=named):
            jax.eval_shape(partial(emit, how), x, pre)
    if size is not None:
        with pytest.raises(ValueError, match=named.replace("3, ", "")):
            ngc_jax.weights(how, pre, post, jnp.ones(size), "silu")
