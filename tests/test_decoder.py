"""The decoder: a plain NumPy forward, causality, the cache, remat, documents, initial scale."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import WHOLE, drawn
from flax.traverse_util import flatten_dict, unflatten_dict

import ngc_jax
from ngc_jax.analysis import attention_weights_by_stage
from ngc_jax.config import base, model_shape
from ngc_jax.core import attention
from ngc_jax.core.rules import RULES
from ngc_jax.data.batches import Batch, next_token_targets
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.synapse import Synapse, SynapsePart
from ngc_jax.training.step import losses

LOOP = {"prelude": 0, "coda": 0}  # one stage, in rounds: what synapses are is the same in each
VARIANTS = {
    "addressed": {},
    "signals": {"form": "signals", **LOOP},
    "broadcast_silu": {"rule": "broadcast", "message_activation": "silu", "p_inter": 5, **LOOP},
    "low_intra": {"p_intra": 2, **LOOP},
    "no_intra": {"p_intra": 0, **LOOP},
    "blocks_only": {"rule": "none", **LOOP},
    "dense": {"rule": "dense", **LOOP},
    "tanh": {"rule": "tanh", "p_intra": 2, "form": "signals", **LOOP},
    "deep": {
        "prelude": 2,
        "core": 2,
        "rounds": 3,
        "coda": 0,
        "state_activation": "tanh",
        "route": "start",
    },
    "no_loop": {"prelude": 2, "core": 0},
    "no_norm_no_gate": {"qk_norm": False, "exchange_activation": "none", **LOOP},
    "encapsulated": {"rule": "dense", "gates": True, **LOOP},
    "both_ways": {"task": "maze_in_place", "attend": 4, **LOOP},
}


@functools.cache
def build(task="", **fields):
    config = base()
    config.update_from_flattened_dict(WHOLE)
    config.model.update(fields)
    config.data.task = task
    model = Decoder(model_shape(config, 50))
    return model, drawn(model)


def tokens(batch=2, length=16):
    return jax.random.randint(jax.random.key(5), (batch, length), 0, 50)


@functools.cache
def forward(model):
    """model.apply as a program of (params, tokens): the logits. One for all tests."""
    return jax.jit(lambda params, tokens: model.apply(params, Batch(tokens))[0])


def numpy_synapse(params, stage, x, activation):
    """y for the fan of a synapse, token by token, from `weights`: [..., fan, n_out]."""
    flat = x.reshape(-1, x.shape[-1])
    total = 0
    for name, states in params.items():
        place, _, rule = name.partition("_")
        active = activation if place == "inter" else None
        fan = []
        for c in range(jax.tree.leaves(states)[0].shape[1]):
            one = jax.tree.map(lambda p, at=(stage, c): p[at], states)
            pre, post = one.get("pre", ()), one["weight" if place == "dense" else "post"]
            if active:
                each = [
                    np.asarray(
                        ngc_jax.weights(rule, pre, post, jnp.asarray(t, jnp.float32), active)
                    )
                    @ t
                    for t in flat
                ]
                fan.append(np.stack(each))
            else:
                fan.append(flat @ np.asarray(ngc_jax.weights(rule, pre, post), np.float64).T)
        total = total + np.stack(fan, axis=1)
    return total.reshape(*x.shape[:-1], *total.shape[1:])


def numpy_gates(weight, read, said):
    """What groups say, louder or softer, token by token."""
    groups, out = weight.shape[-1], np.zeros_like(said)
    size = said.shape[-1] // groups
    for at in np.ndindex(*said.shape[:-1]):
        share = np.exp(read[at] @ np.asarray(weight, np.float64))
        for g in range(groups):
            group = slice(g * size, (g + 1) * size)
            out[at][group] = groups * share[g] / share.sum() * said[at][group]
    return out


def numpy_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(scale)


def numpy_rotate(x):
    length, half = x.shape[1], x.shape[-1] // 2
    out = np.zeros_like(x)
    for t, c in itertools.product(range(length), range(half)):
        angle = t * 10_000.0 ** (-c / half)
        a, b = x[:, t, :, c], x[:, t, :, c + half]
        out[:, t, :, c] = a * np.cos(angle) - b * np.sin(angle)
        out[:, t, :, c + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def numpy_attention(s, params, stage, read):
    """How much each token heeds each other one [B, T, H, S], and the values [B, S, H, d]."""
    made = numpy_synapse(params["query_key_value"], stage, read, s.message_activation)
    query, key, value = (made[..., i, :].reshape(*read.shape[:2], s.heads, -1) for i in range(3))
    if s.qk_norm:
        query = numpy_norm(query, params["query_norm"]["scale"][stage])
        key = numpy_norm(key, params["key_norm"]["scale"][stage])
    query, key = numpy_rotate(query), numpy_rotate(key)
    shares = np.zeros((*query.shape[:3], read.shape[1]))
    for b, t, h in np.ndindex(*query.shape[:3]):
        seen = slice(max(0, t - s.context + 1), t + 1 if s.causal else t + s.context)
        score = key[b, seen, h] @ query[b, t, h] / np.sqrt(query.shape[-1])
        share = np.exp(score - score.max())
        shares[b, t, h, seen] = share / share.sum()
    return shares, value


def numpy_stage(s, params, stage, x, route=None):
    def synapse(name, x):
        return numpy_synapse(params[name], stage, x, s.message_activation)

    def gated(name, read, said):
        return numpy_gates(params[name]["weight"][stage], read, said) if s.gates else said

    read = numpy_norm(x, params["attention_norm"]["scale"][stage])
    shares, value = numpy_attention(s, params, stage, read)
    if route is not None:
        shares, _ = numpy_attention(
            s, params, stage, numpy_norm(route, params["attention_norm"]["scale"][stage])
        )
    mixed = np.zeros_like(value)
    for b, t, h in np.ndindex(*value.shape[:3]):
        mixed[b, t, h] = shares[b, t, h] @ value[b, :, h]
    x = (
        x
        + synapse("attention_out", gated("attention_gates", read, mixed.reshape(x.shape)))[
            ..., 0, :
        ]
    )
    read = numpy_norm(x, params["exchange_norm"]["scale"][stage])
    both = synapse("gate_up", read)
    gate = both[..., 0, :]
    if s.exchange_activation == "silu":
        gate = gate / (1 + np.exp(-gate))
    return x + synapse("down", gated("exchange_gates", read, gate * both[..., 1, :]))[..., 0, :]


def numpy_forward(model, params, tokens):
    """The decoder of docs and docstrings, in float64 loops."""
    s = model.shape

    def run(stages, count, x, route=None):
        for stage in range(count):
            x = numpy_stage(s, stages, stage, x, route)
        return x

    x = np.asarray(params["embed"], np.float64)[np.asarray(tokens)]
    x = run(params.get("prelude"), s.prelude, x)
    if s.core:
        # exp(-softplus(a)) = sigmoid(-a)
        keep = 1 / (1 + np.exp(np.asarray(params["core"]["leak"], np.float64)))
        start = x
        for _ in range(s.rounds):
            added = (
                run(params["core"]["stages"], s.core, x, start if s.route == "start" else None) - x
            )
            x = keep * x + np.asarray(params["core"]["drive"]) * start + added
            x = np.tanh(x) if s.state_activation else x
    x = run(params.get("coda"), s.coda, x)
    return numpy_norm(x, params["norm"]["scale"]) @ np.asarray(params["unembed"], np.float64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_is_the_numpy_forward(variant):
    model, params = build(**VARIANTS[variant])
    x = tokens(1, 6)
    logits = forward(model)(params, x)
    np.testing.assert_allclose(logits, numpy_forward(model, params, x), rtol=2e-4, atol=2e-4)


def test_gates_start_open_and_read_no_later_token():
    config = base()
    config.update_from_flattened_dict({**WHOLE, "model.core": 0, "model.coda": 0})
    plain, gated = (Decoder(model_shape(config, 50)) for config.model.gates in (False, True))
    start, params = jax.jit(lambda key: (plain.init(key), gated.init(key)))(jax.random.key(0))
    info, flat = flatten_dict(gated.param_info()), flatten_dict(params)
    gates = {path: leaf for path, leaf in flat.items() if "gates" in str(path)}
    rest = unflatten_dict({path: leaf for path, leaf in flat.items() if path not in gates})
    assert [leaf.shape[-2:] for leaf in gates.values()] == [(16, 4)] * 2
    assert {info[path].kind for path in gates} == {"matrix"}
    jax.tree.map(np.testing.assert_array_equal, rest, start)
    logits = forward(gated)(params, tokens())
    np.testing.assert_array_equal(logits, forward(plain)(rest, tokens()))

    open_wide = jax.tree.map(
        lambda p: p if np.any(p) else p + jnp.sin(jnp.arange(p.size)).reshape(p.shape), params
    )
    logits = forward(gated)(open_wide, tokens())
    later = forward(gated)(open_wide, tokens().at[:, 9].add(1))
    np.testing.assert_array_equal(later[:, :9], logits[:, :9])
    assert np.all(np.any(later[:, 9:] != logits[:, 9:], axis=-1))


def test_queries_start_at_their_gain_and_keys_at_one():
    config = base()
    config.update_from_flattened_dict({**WHOLE, "model.qk_gain": 3.0})
    model = Decoder(model_shape(config, 50))
    core = lambda key: model.init(key)["core"]["stages"]  # noqa: E731
    norms = jax.jit(lambda key: [core(key)[of]["scale"] for of in ("query_norm", "key_norm")])
    query, key = norms(jax.random.key(0))
    assert np.all(query == 3)
    assert np.all(key == 1)


def test_attention_shares_are_the_numpy_ones():
    model, params = build(rule="dense", core=0, coda=0)
    x, stage = tokens(2, 6), params["prelude"]
    found = jax.jit(partial(attention_weights_by_stage, model))(params, Batch(x))
    read = np.asarray(params["embed"], np.float64)[np.asarray(x)]
    expected, _ = numpy_attention(
        model.shape, stage, 0, numpy_norm(read, stage["attention_norm"]["scale"][0])
    )
    assert {*found} == {"prelude 1"}
    np.testing.assert_allclose(found["prelude 1"], expected.swapaxes(1, 2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["prelude 1"].sum(-1), 1, rtol=1e-5)


def test_attention_in_one_kernel_is_the_written_out_one(monkeypatch):
    """cuDNN's kernel is not to be had here; XLA's function of the same name and arguments stands in
    for it.
    """
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, 9, 3, 8)), jnp.float32) for _ in range(3)
    )
    taken = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        assert implementation == "cudnn"
        return taken(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    for causal in (True, False):
        mask = attention.attention_mask(jnp.arange(9), jnp.arange(9), window=9, causal=causal)
        written = attention.mix(attention.attention_weights(query, key, mask), value)
        fused = attention.attend_fused(query, key, value, causal)
        np.testing.assert_allclose(fused, written, rtol=1e-5, atol=1e-6)


def test_a_stage_takes_the_one_kernel_where_all_the_past_is_seen_and_no_shares_are_asked_for(
    monkeypatch,
):
    config = base()
    config.update_from_flattened_dict(
        {**WHOLE, "model.rule": "dense", "model.core": 0, "model.coda": 0}
    )
    model, taken = Decoder(model_shape(config, 50)), []
    params = jax.eval_shape(model.init, jax.random.key(0))

    def fake(query, key, value, causal):
        assert causal
        taken.append(query.shape[1])
        return jnp.zeros((*query.shape[:2], model.shape.width))

    monkeypatch.setattr(attention, "fused", lambda query: True)
    monkeypatch.setattr(attention, "attend_fused", fake)
    batch = Batch(tokens(2, 16))
    jax.eval_shape(model.apply, params, batch)
    assert taken == [16]
    jax.eval_shape(model.apply, params, Batch(tokens(2, 17)))  # longer than the context
    jax.eval_shape(model.apply, params, batch.replace(segments=jnp.zeros((2, 16), jnp.int32)))
    jax.eval_shape(model.decode, params, tokens(2, 3), model.init_cache(2, 9), 0)
    jax.eval_shape(partial(attention_weights_by_stage, model), params, batch)
    assert taken == [16]


@pytest.mark.parametrize("variant", ["addressed", "broadcast_silu", "deep"])
def test_no_logit_depends_on_a_later_token(variant):
    model, params = build(**VARIANTS[variant])
    embedded = jax.nn.one_hot(tokens(1, 8), 50)

    def logits(embedded):
        # Tokens enter by their embedding only: a table of these rows, read in order, makes them
        # differentiable.
        table = {**params, "embed": embedded[0] @ params["embed"]}
        return model.apply(table, Batch(jnp.arange(8)[None]))[0][0]

    # [T of the logit, T of the token]
    reach = jnp.abs(jax.jit(jax.jacobian(logits))(embedded)).sum((1, 2, 4))
    assert np.all(np.asarray(reach)[np.triu_indices(8, 1)] == 0)
    assert np.all(np.asarray(reach)[np.tril_indices(8)] > 0)


@pytest.mark.parametrize("variant", ["addressed", "deep", "dense", "encapsulated"])
def test_cached_logits_are_the_full_forwards(variant):
    model, params = build(**VARIANTS[variant])
    x = tokens(2, 24)  # longer than the context of 16, so the window matters
    full = forward(model)(params, x)
    decode = jax.jit(model.decode)
    cache = model.init_cache(2, 24)
    first, cache = decode(params, x[:, :5], cache, 0)
    np.testing.assert_allclose(first, full[:, :5], rtol=1e-4, atol=1e-4)
    apart = model.unstack(params)
    for t in range(5, 24):
        one, cache = decode(apart, x[:, t : t + 1], cache, t)
        np.testing.assert_allclose(one[:, 0], full[:, t], rtol=1e-4, atol=1e-4)


def test_decoding_leaves_the_callers_cache_alone():
    model, params = build()
    cache = model.init_cache(1, 4)
    jax.jit(model.decode)(params, tokens(1, 2), cache, 0)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(cache))


def test_forms_and_remat_agree_in_value_and_gradient():
    x = np.array(tokens(2, 17))
    batch = Batch(x[:, :-1], next_token_targets(x, 49))
    reference = None

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

    for form, remat in (
        ("weights", "none"),
        ("weights", "rounds"),
        ("weights", "stages"),
        ("signals", "rounds"),
    ):
        model, params = build(form=form, remat=remat, **LOOP)

        def loss(params, model=model):
            return losses(model, params, batch, jnp.float32)[0].mean()

        found = jax.jit(jax.value_and_grad(loss))(params)
        reference = reference or found
        jax.tree.map(close, found, reference)


def test_isolated_documents_do_not_see_each_other():
    model, params = build()
    x = tokens(1, 12)
    segments = jnp.array([[1] * 6 + [2] * 6])
    together = jax.jit(model.apply)(params, Batch(x, segments=segments))[0]
    # Rotary attention sees distances only, so a document gives the same logits wherever it stands.
    alone = forward(model)(params, x[:, 6:])
    np.testing.assert_allclose(together[:, 6:], alone, rtol=1e-4, atol=1e-5)
    assert not np.allclose(together[:, 6:], forward(model)(params, x)[:, 6:], atol=1e-3)


@pytest.mark.parametrize(
    "variant", ["addressed", "broadcast_silu", "low_intra", "no_intra", "blocks_only", "dense"]
)
def test_synapses_keep_unit_variance_at_start(variant):
    """Up and down, and the same y in both forms."""
    config = base()
    config.model.update({**VARIANTS[variant], "width": 256, "hidden": 768, "p_inter": 16})
    shape, x = model_shape(config, 50), jax.random.normal(jax.random.key(0), (400, 768))

    @jax.jit
    def run(key, x):
        outputs = []
        for n_in, n_out in ((256, 768), (768, 256)):
            forms = {
                form: Synapse(shape.parts(n_in, n_out), n_in, n_out, form, (0, 1))
                for form in ("weights", "signals")
            }
            y, params = forms["weights"].init_with_output(key, x[:, :n_in])
            outputs.append((y, forms["signals"].apply(params, x[:, :n_in])))
        return outputs

    for n_out, (y, signalled) in zip((768, 256), run(jax.random.key(1), x), strict=True):
        assert y.shape == (400, 2, n_out)
        np.testing.assert_allclose(signalled, y, atol=1e-4)
        assert np.var(y) == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize("rule", sorted(name for name, rule in RULES.items() if not rule.inside))
def test_each_rule_serves_between_groups(rule):
    """Unit variance at start, one y in both forms, and a gradient for all that is kept."""
    config = base()
    config.model.update({"rule": rule, "width": 128, "hidden": 256, "p_inter": 4})
    parts, x = (
        model_shape(config, 50).parts(128, 256),
        jax.random.normal(jax.random.key(0), (400, 128)),
    )
    weighed, signalled = (Synapse(parts, 128, 256, form, (0, 1)) for form in ("weights", "signals"))

    def act(params, synapse):
        y = synapse.apply(params, x)
        return jnp.sum(jnp.sin(y)), y

    @jax.jit
    def run(key):
        params, found = weighed.init(key, x), {}
        for synapse in (weighed, signalled):
            how = {"has_aux": True, "allow_int": True}  # who leads is a whole number
            (_, y), grads = jax.value_and_grad(act, **how)(params, synapse)
            kept = [grad for grad in jax.tree.leaves(grads) if grad.dtype != jax.dtypes.float0]
            found[synapse.form] = y, kept
        return found

    found = run(jax.random.key(1))
    for y, grads in found.values():
        assert np.var(y) == pytest.approx(1, abs=0.12)
        for path, grad in jax.tree_util.tree_leaves_with_path(grads):
            assert np.all(np.isfinite(grad)), path
            assert np.mean(np.asarray(grad) != 0) > 0.95, path
    np.testing.assert_allclose(found["weights"][0], found["signals"][0], atol=1e-4)


def test_the_stream_stays_of_order_one_at_start():
    config = base()
    model = Decoder(model_shape(config, 257))
    params = jax.jit(model.init)(jax.random.key(0))
    x = jax.random.randint(jax.random.key(1), (4, 64), 0, 257)
    logits, records = jax.jit(lambda p, x: model.apply(p, Batch(x), record=True))(params, x)
    assert np.std(logits) < 0.2, "training should start from about the uniform distribution"
    assert 0.5 < np.max(records.growth) < 2


def test_states_of_one_side_are_one_hot_from_the_group_size_on():
    config = base()
    shape = model_shape(config, 257)  # groups of 16 neurons, and of 48 in the hidden layer
    assert shape.parts(128, 384)[0] == SynapsePart("intra", "block", 8, 128, None)
    config.model.p_intra = 15
    assert model_shape(config, 257).parts(128, 384)[0].rule == "within"
