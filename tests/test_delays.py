"""Conduction delays: NumPy, time's arrow, documents, the cache, the bound on gain, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WHOLE, drawn

from ngc_jax.analysis import stability
from ngc_jax.analysis.probes import _loudness
from ngc_jax.config import base, make_model, model_shape, validate
from ngc_jax.core.delays import late, parse
from ngc_jax.core.rules import GATES, weights
from ngc_jax.count import forward_flops
from ngc_jax.data.batches import Batch
from ngc_jax.nn import NGCDense
from ngc_jax.nn.bdh import BDH, BDHShape
from ngc_jax.nn.synapse import Heard, Synapse
from ngc_jax.runtime.errors import UserError

LOOP = {"prelude": 0, "coda": 0}
BDH_FIELDS = {"kind": "bdh", "hidden": 32, "delays": "0,2"}
VARIANTS = {
    "ports": {"delays": "0,1", "p_inter": 2, "wiring": "others", **LOOP},
    "all late": {"delays": "1", "route": "start", "form": "signals", **LOOP},
    "learned": {"delays": "taps:3", **LOOP},
    "low rank": {"rule": "broadcast", "p_intra": 0, "delays": "0,3", "core": 0, "coda": 0},
    "dense": {"rule": "dense", "delays": "0,1", **LOOP},
}


def settings(**fields):
    config = base()
    config.update_from_flattened_dict(WHOLE)
    config.model.update(fields)
    return config


def build(**fields):
    if fields.get("kind") == "bdh":
        model = BDH(BDHShape(50, 16, 32, 4, 2, delays=fields["delays"]))
    else:
        model = make_model(settings(**fields), 50)
    return model, drawn(model)


def shifted(x, by):
    """x [T, n], so many tokens later."""
    return np.concatenate([np.zeros((by, *x.shape[1:])), x])[: len(x)]


def test_late_is_a_sum_over_what_was_said():
    signal, taps = np.random.default_rng(0).normal(size=(2, 9, 3, 4)), np.arange(12.0).reshape(3, 4)
    segments = np.array([[0] * 9, [0] * 4 + [1] * 5])
    expected = np.zeros_like(signal)
    for b, t, d in np.ndindex(2, 9, 3):
        if t >= d and segments[b, t] == segments[b, t - d]:
            expected[b, t] += taps[d] * signal[b, t - d]
    signal, taps = jnp.asarray(signal, jnp.float32), jnp.asarray(taps, jnp.float32)
    found, _ = late(signal, taps, jnp.asarray(segments))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # In parts, the last of which are shorter than the kernel is long.
    past, parts = None, []
    for part in jnp.split(signal, (4, 5, 6), axis=1):
        heard, past = late(part, taps, None, past)
        parts.append(heard)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), late(signal, taps)[0], rtol=1e-6)
    fixed = parse("0,1,2").kernel(4)  # of number 3, again that of number 0
    np.testing.assert_array_equal(late(signal, fixed)[0][:, 1:, :, 1], signal[:, :-1, :, 1])
    np.testing.assert_array_equal(late(signal, fixed)[0][..., 3], signal[..., 3])


@pytest.mark.parametrize("name", ["ports", "all late", "learned", "low rank", "dense"])
def test_a_synapse_hears_each_number_as_late_as_it_is(name):
    """y = sum over d of W_d x_{t-d}, in both forms, at unit variance where it starts."""
    config = settings(**{**VARIANTS[name], "width": 64, "hidden": 128, "groups": 4, "p_inter": 8})
    active = "silu" if name == "low rank" else None
    config.model.message_activation = active or "none"
    shape, x = model_shape(config, 50), jax.random.normal(jax.random.key(0), (2, 200, 64))
    asked = Synapse(shape.parts(64, 128), 64, 128, "weights")
    y, made = jax.jit(asked.init_with_output)(jax.random.key(1), x)
    assert np.var(y) == pytest.approx(1, abs=0.12)
    signalled = Synapse(asked.parts, 64, 128, "signals")
    np.testing.assert_allclose(
        jax.jit(signalled.apply)({"params": made["params"]}, x), y, atol=1e-4
    )
    row, expected = np.asarray(x[0], np.float64), 0.0
    for part in asked.parts:
        states = jax.tree.map(lambda p: p[0], made["params"][part.name])
        pre, post = states.get("pre", ()), states.get("post", states.get("weight"))
        if part.place == "intra":
            expected = expected + row @ np.asarray(weights(part.how, pre, post)).T
            continue
        numbers = 64 if part.place == "dense" else 8
        kernel = np.asarray(made["params"].get(part.taps, part.delays.kernel(numbers)))
        if active:
            said = row @ np.asarray(pre)
            said = said * np.asarray(GATES[active](said))
            heard = sum(share * shifted(said, d) for d, share in enumerate(kernel))
            expected = expected + heard @ np.asarray(post).T
            continue
        for d, share in enumerate(kernel):
            sides = (pre, post * share) if part.place == "dense" else (pre * share, post)
            expected = expected + shifted(row, d) @ np.asarray(weights(part.how, *sides)).T
    np.testing.assert_allclose(y[0, :, 0], expected, atol=1e-4)


@pytest.mark.parametrize("name", [*VARIANTS, "bdh"])
def test_tokens_hear_only_back_in_their_document_and_the_cache_knows_it(name):
    model, params = build(**VARIANTS.get(name, BDH_FIELDS))
    x = jax.random.randint(jax.random.key(5), (2, 12), 0, 50)
    run = jax.jit(lambda params, x, segments: model.apply(params, Batch(x, segments=segments))[0])
    one, two = jnp.zeros((2, 12), jnp.int32), jnp.broadcast_to(jnp.arange(12) // 6, (2, 12))
    full = run(params, x, one)
    # What comes later changes nothing; what came before does.
    changed = run(params, x.at[:, 7].add(1) % 50, one)
    np.testing.assert_array_equal(changed[:, :7], full[:, :7])
    assert np.all(np.abs(changed - full)[:, 7:].max(-1) > 0)
    # A document is what it is alone.
    alone = run(params, jnp.roll(x, -6, axis=1), one)[:, :6]
    np.testing.assert_allclose(run(params, x, two)[:, 6:], alone, rtol=1e-4, atol=1e-5)
    # A prompt, then token by token.
    decode, cache = jax.jit(model.decode), model.init_cache(2, 12)
    first, cache = decode(params, x[:, :5], cache, 0)
    np.testing.assert_allclose(first, full[:, :5], rtol=1e-4, atol=1e-4)
    apart = model.unstack(params)
    for t in range(5, 12):
        logits, cache = decode(apart, x[:, t : t + 1], cache, t)
        np.testing.assert_allclose(logits[:, 0], full[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", ["addressed", "dense"])
def test_delays_cost_no_parameters_and_no_flops(rule):
    def costs(delays):
        asked = Synapse(
            model_shape(settings(rule=rule, delays=delays), 50).parts(16, 16), 16, 16, "signals"
        )
        params = jax.eval_shape(asked.init, jax.random.key(0), x)["params"]
        return params, forward_flops(asked.apply, {"params": params}, x)

    x = jnp.zeros((2, 8, 16))
    assert costs("0,1") == costs("")
    assert costs("taps:4")[1] == costs("")[1]


def test_the_bound_on_gain_holds_where_late_and_early_differences_add_up():
    model, params = build(**VARIANTS["learned"])
    stage = params["core"]["stages"]
    own = jax.tree.map(lambda p: p[0], stage["down"])
    # What is heard at once is taken back a token later: nothing of a lasting input is left.
    own["inter_addressed_taps"] = (
        jnp.zeros_like(own["inter_addressed_taps"]).at[:2].set([[1], [-1]])
    )
    own["intra_block"]["post"] = 0 * own["intra_block"]["post"]
    params["core"]["stages"] = stage | {"down": jax.tree.map(lambda p: p[None], own)}
    s = model.shape
    synapse = Synapse(s.parts(s.hidden, s.width), s.hidden, s.width, "signals")
    act = lambda x: synapse.apply({"params": own}, x[None])[0, :, 0]  # noqa: E731
    jacobian = jax.jit(jax.jacobian(act))(jnp.zeros((12, s.hidden)))
    norm = np.linalg.norm(np.asarray(jacobian).reshape(12 * s.width, -1), 2)
    states = jax.tree.map(lambda p: p[0], own["inter_addressed"])
    alone = np.linalg.norm(weights("addressed", states["pre"], states["post"]), 2)
    bound = stability.gain_bounds(model, params)["core 1"]["down"]
    assert 1.9 * alone < norm <= bound


def test_traffic_is_what_is_heard_of_the_same_document():
    parts = model_shape(settings(delays="1"), 50).parts(16, 16)
    late, prompt = (
        Synapse(of, 16, 16, "signals") for of in (parts, (parts[1]._replace(delays=parse("")),))
    )
    x, segments = (
        jax.random.normal(jax.random.key(0), (2, 6, 16)),
        jnp.arange(6) // 3 * jnp.ones((2, 1), int),
    )
    params = jax.jit(late.init)(jax.random.key(1), x)["params"]
    found = _loudness(Heard(late.bind({"params": params}), (0,), x, x, segments), 4)
    before = jnp.roll(x, 1, axis=1).at[:, ::3].set(0)
    of = {"params": {parts[1].name: params[parts[1].name]}}
    np.testing.assert_allclose(
        found, _loudness(Heard(prompt.bind(of), (0,), before, x), 4), rtol=1e-5
    )


@pytest.mark.parametrize("delays", ["0,x", "taps:1", "-1", "0, 1", "learned"])
def test_other_texts_are_refused_with_one_that_works(delays):
    config = settings(delays=delays)
    with pytest.raises(UserError, match=f"model.delays='{delays}': must be .*'0,1'"):
        validate(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delays": "0,16"}, "of less than data.context=16 tokens"),
        ({"delays": "1", "rule": "tanh"}, "'' where model.rule='tanh'"),
        ({"delays": "1", "rule": "leaders"}, "'' where model.rule='leaders'"),
        ({"delays": "1", "wiring": "dynamic", "channels": 3}, "'' where model.wiring is dynamic"),
        ({"kind": "bdh", "delays": "taps:2"}, "fixed, such as '0,1'"),
        ({"kind": "recurrent", "delays": "1"}, "'recurrent' does not read this"),
    ],
)
def test_what_no_delay_can_act_on_is_refused(fields, message):
    config = base() if "kind" in fields else settings()
    config.model.update(fields)
    config.stability.every = 0
    with pytest.raises(UserError, match=message):
        validate(config)


def test_a_layer_alone_refuses_by_name():
    for layer, message in (
        (NGCDense(16, rule="tanh", delays="1"), "rule='tanh': must be one of .* with delays='1'"),
        (NGCDense(16, delays="one"), "delays='one': must be '', tokens such as '0,1'"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 24)))
    layer = NGCDense(16, groups=4, delays="0,1")
    with pytest.raises(ValueError, match=r"x: shape \[24\]; must be \[..., tokens, 24\]"):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros(24))
