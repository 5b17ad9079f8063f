"""Layers for other people: against NumPy, in Flax Linen and NNX models, with optax, under JAX's
transformations; sizes, initial scale, and what is refused.
"""

import functools
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from conftest import drawn, shaken
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, AxisType
from test_decoder import numpy_attention, numpy_synapse
from test_rules import DIM, N_IN, N_OUT, G, loop_weight

import ngc_jax.nn
from ngc_jax.core.rules import RULES, Rule, SignalRule
from ngc_jax.core.wiring import WIRINGS
from ngc_jax.nn import NGCMLP, Batch, Decoder, ModelShape, NGCAttention, NGCDense
from ngc_jax.nn import mesh as meshes

BETWEEN = [name for name, rule in RULES.items() if not rule.inside]
X = jax.random.normal(jax.random.key(1), (5, N_IN))


def dense(rule, **fields):
    return NGCDense(N_OUT, groups=G, rule=rule, ports=DIM, **fields)


LAYERS = {name: dense(name) for name in [*BETWEEN, "none", "dense"]}
LAYERS["addressed"] = dense("addressed", wiring="complete")
LAYERS |= {
    "others": dense("addressed"),
    "ring": dense("addressed", wiring="ring", channels=2),
    "regular": dense("addressed", wiring="regular", channels=1, wiring_seed=3),
    "gated": dense("broadcast", message_activation="silu"),
    "low_intra": dense("none", intra=2, use_bias=False),
    "no_intra": dense("addressed", intra=0),
}


@functools.cache
def acted():
    """{layer: (parameters away from their start, y of X, y in the other form)}, in two programs."""

    @jax.jit
    def init(key):
        return {name: layer.init(key, X)["params"] for name, layer in LAYERS.items()}

    @jax.jit
    def apply(params):
        return {
            name: [
                layer.clone(form=form).apply({"params": params[name]}, X)
                for form in ("weights", "signals")
            ]
            for name, layer in LAYERS.items()
        }

    params = shaken(init(jax.random.key(0)))
    found = apply(params)
    return {name: (params[name], *found[name]) for name in LAYERS}


def numpy_dense(layer, params, x):
    """x W^T + b in float64 loops, W by the definitions of the rules."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    n, m, w, y = N_IN // G, N_OUT // G, np.zeros((N_OUT, N_IN)), 0
    if "dense_block" in params:
        w += params["dense_block"]["weight"][0, 0]
    for g in range(G):
        block = np.s_[g * m : (g + 1) * m, g * n : (g + 1) * n]
        if "intra_block" in params:
            w[block] += params["intra_block"]["post"][0, g]
        if "intra_within" in params:
            within = params["intra_within"]
            w[block] += within["post"][0, g] @ within["pre"][0, g].T
    states = params.get(f"inter_{layer.rule}")
    if states is not None:
        pre, post = (jax.tree.map(lambda p: p[0], states[side]) for side in ("pre", "post"))
        if layer.rule == "addressed" and layer.wiring != "complete":
            table = WIRINGS[layer.wiring or "others"](G, layer.channels, layer.wiring_seed)
            for g, row in enumerate(table):
                for slot, h in enumerate(row):
                    block = np.s_[g * m : (g + 1) * m, h * n : (h + 1) * n]
                    w[block] += post[g, :, slot] @ pre[g, :, slot].T
        elif layer.message_activation:
            z = x @ pre
            y = (z / (1 + np.exp(-z))) @ post.T
        else:
            w += [
                [loop_weight(layer.rule, pre, post, j, i) for i in range(N_IN)]
                for j in range(N_OUT)
            ]
    return y + x @ w.T + params.get("bias", 0)


@pytest.mark.parametrize("name", LAYERS)
def test_a_dense_layer_is_the_numpy_product(name):
    params, y, signalled = acted()[name]
    expected = numpy_dense(LAYERS[name], params, np.asarray(X, np.float64))
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(signalled, expected, atol=2e-5)


TOKENS = jax.random.normal(jax.random.key(2), (2, 6, 16))
ATTENTION = NGCAttention(heads=2, groups=4, ports=3, wiring="complete", context=4)
MLP = NGCMLP(24, groups=4, rule="metric", ports=3, activation="silu")


@functools.cache
def begun(layer):
    """Parameters away from their start, and layer.apply as a program."""
    params = shaken(jax.jit(layer.init)(jax.random.key(0), TOKENS))
    return params, jax.jit(layer.apply)


def as_stage(params):
    """The parameters as those of the first stage of a stack."""
    return jax.tree.map(lambda p: p[None], params["params"])


def test_attention_is_the_numpy_one():
    params, apply = begun(ATTENTION)
    shape = SimpleNamespace(heads=2, context=4, causal=True, qk_norm=True, message_activation=None)
    x, stage = np.asarray(TOKENS, np.float64), as_stage(params)
    shares, value = numpy_attention(shape, stage, 0, x)
    mixed = np.einsum("bths,bshd->bthd", shares, value).reshape(x.shape)
    expected = numpy_synapse(stage["attention_out"], 0, mixed, None)[..., 0, :]
    np.testing.assert_allclose(apply(params, TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_attention_keeps_documents_apart_and_shows_its_weights():
    params, apply = begun(ATTENTION)
    segments = jnp.array([[0, 0, 0, 1, 1, 1]] * 2)
    together = apply(params, TOKENS, segments)
    alone = apply(params, TOKENS.reshape(4, 3, 16)).reshape(together.shape)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    _, seen = ATTENTION.apply(params, TOKENS, segments, mutable="intermediates")
    (shares,) = seen["intermediates"]["attention"]
    assert shares.shape == (2, 2, 6, 6)
    assert not np.any(shares[:, :, 3:, :3])


def test_an_mlp_is_the_numpy_one():
    params, apply = begun(MLP)
    stage, x = as_stage(params), np.asarray(TOKENS, np.float64)
    gate, value = np.moveaxis(numpy_synapse(stage["gate_up"], 0, x, None), -2, 0)
    expected = numpy_synapse(stage["down"], 0, gate / (1 + np.exp(-gate)) * value, None)[..., 0, :]
    np.testing.assert_allclose(apply(params, TOKENS), expected, rtol=1e-4, atol=1e-5)


# ---- In other people's models ----

POINTS = jax.random.normal(jax.random.key(0), (500, 8))
SIGNS = (POINTS[:, 0] * POINTS[:, 1] > 0).astype(int)  # no linear layer tells them apart


class Classifier(nn.Module):
    """A Flax model of someone else's."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(NGCDense(64, groups=4)(x)))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, SIGNS).mean()


def test_a_classifier_learns_with_optax_alone():
    model, adam = Classifier(), optax.adam(0.01)
    assert {*flatten_dict(jax.eval_shape(model.init, jax.random.key(0), POINTS), sep="/")} == {
        "params/NGCDense_0/intra_block/post",
        "params/NGCDense_0/inter_addressed/pre",
        "params/NGCDense_0/inter_addressed/post",
        "params/NGCDense_0/bias",
        "params/Dense_0/kernel",
        "params/Dense_0/bias",
    }

    @jax.jit
    def learn(key):
        def step(carry, _):
            params, memory = carry
            grads = jax.grad(lambda p: cross_entropy(model.apply(p, POINTS)))(params)
            updates, memory = adam.update(grads, memory)
            return (optax.apply_updates(params, updates), memory), None

        params = model.init(key, POINTS)
        (params, _), _ = jax.lax.scan(step, (params, adam.init(params)), length=200)
        return model.apply(params, POINTS)

    assert np.mean(np.argmax(learn(jax.random.key(1)), axis=-1) == SIGNS) > 0.95


class Reader(nn.Module):
    """A Transformer of someone else's: its own norms, layers by `nn.scan` and `nn.remat`."""

    @nn.compact
    def __call__(self, tokens):
        @nn.remat
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = x + NGCAttention(heads=2, groups=4, name="attention")(nn.LayerNorm()(x))
                return x + NGCMLP(32, groups=4, gates=True, name="mlp")(nn.LayerNorm()(x)), None

        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(nn.Embed(11, 16)(tokens), None)
        return nn.Dense(11)(x)


def test_layers_serve_in_a_scanned_transformer():
    model, tokens = Reader(), jax.random.randint(jax.random.key(0), (2, 7), 0, 11)

    @jax.jit
    def run(key):
        params = model.init(key, tokens)
        jacobian = jax.jacrev(lambda p: model.apply(p, tokens)[0, 3])(params)
        return (
            params,
            model.apply(params, tokens),
            model.apply(params, tokens.at[:, 4:].add(1) % 11),
            jacobian,
        )

    params, logits, later, gradient = run(jax.random.key(1))
    assert logits.shape == (2, 7, 11)
    np.testing.assert_allclose(later[:, :4], logits[:, :4], atol=1e-6)
    blocks = flatten_dict(params["params"]["blocks"], sep="/")
    assert blocks["attention/query_key_value/intra_block/post"].shape == (3, 3, 4, 4, 4)
    assert blocks["mlp/exchange_gates/weight"].shape == (3, 16, 4)
    assert all(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(gradient))


def test_a_layer_serves_in_an_nnx_model():
    class Model(nnx.Module):
        def __init__(self, rngs):
            layer = nnx.bridge.ToNNX(NGCDense(64, groups=4), rngs)
            self.hidden = nnx.bridge.lazy_init(layer, POINTS[:1])
            self.out = nnx.Linear(64, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    model = Model(nnx.Rngs(0))
    params = dict(nnx.to_pure_dict(nnx.state(model.hidden, nnx.Param)).items())
    expected = NGCDense(64, groups=4).apply({"params": params}, POINTS)
    np.testing.assert_allclose(model.hidden(POINTS), expected, rtol=1e-5, atol=1e-6)

    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(POINTS)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_layers_know_nothing_of_the_axes_of_another_mesh():
    layer = NGCAttention(heads=2, groups=4, rule="broadcast", form="signals")
    for axes in (("model",), ("data", "model"), meshes.MESH_AXES):
        mesh = AbstractMesh((2,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.make_jaxpr(layer.init_with_output)(jax.random.key(0), TOKENS)
        assert ("sharding_constraint" in str(traced)) == (axes == meshes.MESH_AXES)


# ---- Under JAX's transformations ----


def test_eager_jit_and_vmap_give_the_same():
    params, apply = begun(MLP)
    y = apply(params, TOKENS)
    np.testing.assert_allclose(MLP.apply(params, TOKENS), y, rtol=1e-4, atol=1e-5)
    rows = jax.jit(jax.vmap(MLP.apply, (None, 0)))(params, TOKENS)
    np.testing.assert_allclose(rows, y, rtol=1e-4, atol=1e-5)


def test_an_ensemble_is_its_members():
    layer, keys = dense("addressed", message_activation="gelu"), jax.random.split(jax.random.key(3))

    @jax.jit
    def run(keys):
        members = jax.vmap(layer.init, (0, None))(keys, X)
        alone = [layer.init(key, X) for key in keys]
        return (
            members,
            jax.vmap(layer.apply, (0, None))(members, X),
            alone,
            [layer.apply(one, X) for one in alone],
        )

    members, together, alone, each = run(keys)
    stacked = jax.tree.map(lambda *p: jnp.stack(p), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), members, stacked)
    np.testing.assert_allclose(together, jnp.stack(each), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["others", "gated"])
def test_gradients_of_input_and_states_agree_with_finite_differences(name):
    layer, params = LAYERS[name], acted()[name][0]
    loss = jax.jit(lambda p, x: jnp.sum(jnp.sin(layer.apply({"params": p}, x))))
    jax.test_util.check_grads(
        loss, (params, X), order=1, modes=["fwd", "rev"], atol=3e-2, rtol=3e-2
    )


def test_a_layer_computes_in_the_numbers_that_it_is_given():
    params, _ = begun(MLP)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    y = jax.eval_shape(MLP.apply, half, TOKENS.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


# ---- Sizes and start ----


def size(layer, x=X):
    tree = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_parameters_are_as_many_as_the_docstrings_say():
    blocks = N_IN * N_OUT // G
    assert size(LAYERS["others"]) == blocks + DIM * (G - 1) * (N_IN + N_OUT) + N_OUT
    assert size(LAYERS["ring"]) == blocks + DIM * 2 * (N_IN + N_OUT) + N_OUT
    assert size(LAYERS["none"]) == blocks + N_OUT
    assert size(LAYERS["dense"]) == N_IN * N_OUT + N_OUT
    assert size(LAYERS["low_intra"]) == 2 * (N_IN + N_OUT)
    x = TOKENS
    assert size(NGCMLP(24, groups=4), x) == 3 * 16 * 24 // 4 + 3 * 2 * 3 * (16 + 24)
    attention = 4 * 16 * 16 // 4 + 8 * 2 * 3 * 16 + 2 * 16 // 2
    assert size(NGCAttention(heads=2, groups=4), x) == attention
    shared = NGCAttention(heads=2, groups=4, senders=(0, 0, 0))
    assert size(shared, x) == attention - 2 * 2 * 3 * 16  # two of three send states less


def test_unit_variance_stays_at_the_start():
    layers = {
        name: NGCDense(512, rule=name, ports=8 if isinstance(RULES[name], SignalRule) else 3)
        for name in BETWEEN
    }
    layers |= {
        "ring": NGCDense(512, wiring="ring"),
        "gated": NGCDense(512, message_activation="gelu", ports=16),
        "low_intra": NGCDense(512, intra=8),
        "dense": NGCDense(512, rule="dense"),
        "rank": NGCDense(512, init_rank=64),
        "half": NGCDense(512, gain=0.5),
    }

    @jax.jit
    def variances(key, x):
        return {name: jnp.var(one.init_with_output(key, x)[0]) for name, one in layers.items()}

    found = variances(jax.random.key(0), jax.random.normal(jax.random.key(1), (1000, 256)))
    wanted = dict.fromkeys(layers, 1.0) | {"half": 0.25}
    assert {k: float(v) for k, v in found.items()} == pytest.approx(wanted, rel=0.12)


# Of commit 013250b: work directories of then are to open.
STAGE = """
attention_gates/weight (1, 128, 8)
attention_norm/scale (1, 128)
attention_out/inter_addressed/post (1, 1, 8, 16, 8, 3)
attention_out/inter_addressed/pre (1, 1, 8, 16, 8, 3)
attention_out/intra_within/post (1, 1, 8, 16, 2)
attention_out/intra_within/pre (1, 1, 8, 16, 2)
down/inter_addressed/post (1, 1, 8, 16, 8, 3)
down/inter_addressed/pre (1, 1, 8, 48, 8, 3)
down/intra_within/post (1, 1, 8, 16, 2)
down/intra_within/pre (1, 1, 8, 48, 2)
exchange_gates/weight (1, 128, 8)
exchange_norm/scale (1, 128)
gate_up/inter_addressed/post (1, 2, 8, 48, 8, 3)
gate_up/inter_addressed/pre (1, 2, 8, 16, 8, 3)
gate_up/intra_within/post (1, 2, 8, 48, 2)
gate_up/intra_within/pre (1, 2, 8, 16, 2)
key_norm/scale (1, 32)
query_key_value/inter_addressed/post (1, 3, 8, 16, 8, 3)
query_key_value/inter_addressed/pre (1, 3, 8, 16, 8, 3)
query_key_value/intra_within/post (1, 3, 8, 16, 2)
query_key_value/intra_within/pre (1, 3, 8, 16, 2)
query_norm/scale (1, 32)
"""


def test_parameters_of_a_stage_are_named_as_they_were():
    model = Decoder(ModelShape(vocab=50, gates=True, p_intra=2))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert {*params} == {"embed", "unembed", "norm", "prelude", "core", "coda"}
    assert {*params["core"]} == {"stages", "leak", "drive"}
    for stack in (params["prelude"], params["core"]["stages"], params["coda"]):
        stages = flatten_dict(stack, sep="/")
        found = [f"{name} {leaf.shape}" for name, leaf in sorted(stages.items())]
        assert found == STAGE.split("\n")[1:-1]


def test_a_decoder_can_be_made_of_its_shape_alone():
    model = Decoder(ModelShape(vocab=11, width=16, hidden=32, groups=4, heads=2, prelude=0, coda=0))
    batch = Batch(jnp.zeros((2, 7), jnp.int32))
    logits, _ = jax.eval_shape(model.apply, drawn(model), batch)
    assert logits.shape == (2, 7, 11)


def test_the_public_names_are_there_and_no_others():
    assert {*ngc_jax.nn.__all__} <= {*dir(ngc_jax.nn)}
    assert all(getattr(ngc_jax.nn, name) for name in ngc_jax.nn.__all__)
    with pytest.raises(AttributeError, match=r"ngc_jax.nn.* 'NGCConv'"):
        _ = ngc_jax.nn.NGCConv


# ---- A rule of one's own ----


class Directions(Rule):
    """W[j, i] = R[j] . S[i] / |S[i]|."""

    grouped = False

    def init(self, key, groups, n_in, n_out, dim):
        states = jax.random.normal(key, (n_in + n_out, dim))
        return states[:n_in], self.rescale(states[:n_in], states[n_in:])

    def weights(self, pre, post):
        return post @ (pre / jnp.linalg.norm(pre, axis=1, keepdims=True)).T


def test_a_rule_of_ones_own_is_used_at_once(monkeypatch):
    layer = dense("directions")
    with pytest.raises(ValueError, match="rule='directions': must be one of addressed, broadcast"):
        layer.init(jax.random.key(0), X)
    monkeypatch.setitem(RULES, "directions", Directions())
    y, params = layer.init_with_output(jax.random.key(0), X)
    states = jax.tree.map(lambda p: np.asarray(p[0]), params["params"]["inter_directions"])
    w = states["post"] @ (states["pre"] / np.linalg.norm(states["pre"], axis=1)[:, None]).T
    blocks = np.asarray(params["params"]["intra_block"]["post"][0])
    for g in range(G):
        w[g * 4 : (g + 1) * 4, g * 6 : (g + 1) * 6] += blocks[g]
    np.testing.assert_allclose(y, np.asarray(X) @ w.T, atol=1e-5)


# ---- Refusals ----


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (NGCDense(30), r"groups=8: must divide n_in=24 and n_out=30, for instance groups=6"),
        (NGCDense(16, groups=0), r"groups=0: must divide .* groups=1"),
        (
            NGCMLP(30, groups=8),
            r"groups=8: must divide n_in=24 and n_out=30, for instance groups=6",
        ),
        (NGCDense(16, rule="adressed"), r"rule='adressed': must be one of addressed.*none, dense"),
        (NGCDense(16, rule="within"), r"rule='within': must be one of addressed, broadcast"),
        (
            NGCDense(16, message_activation="sliu"),
            r"message_activation='sliu': .* silu, gelu, relu",
        ),
        (NGCDense(16, rule="tanh", message_activation="silu"), r"rule='tanh': sends no signal"),
        (NGCMLP(16, activation="swish"), r"activation='swish': must be one of silu, gelu, relu"),
        (NGCDense(16, wiring="rings"), r"wiring='rings': must be one of complete, others, ring, s"),
        # Its wiring would be integers among the parameters, which jax.grad refuses.
        (NGCDense(16, wiring="dynamic"), r"wiring='dynamic': must be one of complete, others, r"),
        (NGCMLP(16, wiring="dynamic_ports"), r"wiring='dynamic_ports': must be one of complete"),
        (NGCAttention(wiring="dynamic"), r"wiring='dynamic': must be one of complete, others, r"),
        (NGCDense(16, rule="metric", wiring="ring"), r"wiring='ring': must be None"),
        (NGCDense(16, groups=1, wiring="ring"), r"wiring='ring': must be None"),
        (
            NGCDense(16, groups=4, wiring="ring"),
            r"channels=4: must be one of 1, 2, 3 with groups=4",
        ),
        (NGCDense(16, wiring="block"), r"channels=4: must be one of 1, 3, 7 with groups=8"),
        (NGCDense(16, ports=0), r"ports=0: must be 1 or more"),
        (NGCDense(16, intra=-1), r"intra=-1: must be 0 or more"),
        (NGCDense(16, rule="none", intra=0), r"intra=0: must be 1 or more"),
        (NGCDense(16, init_rank=12), r"init_rank=12: must be a multiple of 8"),
        (NGCDense(16, form="signal"), r"form='signal': must be one of weights, signals"),
        (NGCAttention(heads=3), r"heads=3: must be one of 1, 2, 4 for width 24 and groups=8"),
        (NGCAttention(heads=5, rule="dense"), r"heads=5: must be one of 1, 2, 3, 4, 6, 12 for"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_does(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((2, 5, 24)))


def test_attention_wants_tokens():
    with pytest.raises(ValueError, match=r"x: shape \[5, 24\]; must be \[batch, tokens, width\]"):
        jax.eval_shape(NGCAttention().init, jax.random.key(0), X)
