"""The published baselines, BDH and CoLA: their authors' code's numbers (golden/make.py), and what
the harness needs.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, batch_of
from golden import make

import ngc_jax
from experiments.compare import MODELS
from experiments.learning import generated
from ngc_jax import count
from ngc_jax.config import base, model_shape, validate
from ngc_jax.data.batches import Batch
from ngc_jax.nn.bdh import BDH, BDHShape
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.sampling import Sampling, generate
from ngc_jax.training import optimizer as optim
from ngc_jax.training.step import init_state, make_train_step

SHAPE = BDHShape(
    vocab=make.BDH["vocab_size"],
    width=make.BDH["n_embd"],
    hidden=make.BDH["mlp_internal_dim_multiplier"] * make.BDH["n_embd"],
    heads=make.BDH["n_head"],
    layers=make.BDH["n_layer"],
)


def golden(name):
    return json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())


def bdh(std, **fields):
    """The golden model of these weights, and the names that the reference has for ours."""
    w = {name: jnp.asarray(weight, jnp.float32) for name, weight in make.bdh_weights(std).items()}
    matrices = {name: {"weight": w[name]} for name in ("encoder", "encoder_v", "decoder")}
    params = {"embed": w["embed.weight"], **matrices, "unembed": w["lm_head"]}
    return BDH(BDHShape(**{**vars(SHAPE), **fields})), params


def loss(model, params, inputs, targets):
    chosen = jax.nn.log_softmax(model.apply(params, Batch(inputs))[0])
    return -jnp.take_along_axis(chosen, targets[..., None], axis=-1).mean()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", make.BDH_STD)
def test_bdh_is_the_published_function(name, remat):
    expected = golden("bdh")[name]
    model, params = bdh(make.BDH_STD[name], remat=remat)
    inputs, targets = map(jnp.asarray, make.tokens(SHAPE.vocab))
    logits, _ = jax.jit(model.apply)(params, Batch(inputs))
    np.testing.assert_allclose(
        logits[..., :: make.BDH_COLUMNS], expected["logits"], rtol=1e-5, atol=1e-5
    )
    value, gradient = jax.jit(jax.value_and_grad(lambda p: loss(model, p, inputs, targets)))(params)
    assert float(value) == pytest.approx(expected["loss"], abs=1e-5)
    ours = {"embed.weight": gradient["embed"], "lm_head": gradient["unembed"]}
    ours |= {name: gradient[name]["weight"] for name in ("encoder", "encoder_v", "decoder")}
    norms = {name: float(jnp.linalg.norm(g.ravel())) for name, g in ours.items()}
    assert norms == pytest.approx(expected["gradient_norms"], rel=1e-4)


def test_bdh_begins_as_published():
    shape = BDHShape(width=64, hidden=1024)
    params = jax.jit(BDH(shape).init)(jax.random.key(0))
    for leaf in jax.tree.leaves(params):
        assert np.std(leaf) == pytest.approx(0.02, rel=0.03)
        assert np.mean(leaf) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bdh_learns(optimizer):
    model, params = bdh(0.02)
    config = base().train
    config.update({"optimizer": optimizer, "learning_rate": 1e-3, "steps": 20, "warmup_steps": 2})
    state = init_state(model, config, 0)
    memory = optim.make_optimizer(config, model.param_info()).init(params)
    state = state.replace(params=params, optimizer=memory)
    step = jax.jit(make_train_step(model, config))
    tokens = np.concatenate([np.asarray(t) for t in make.tokens(SHAPE.vocab)], axis=1)
    text = batch_of(tokens, boundary=SHAPE.vocab)
    found = []
    for _ in range(20):
        state, scalars = step(state, text)
        found.append(float(scalars["train/loss"]))
        assert 0 < scalars["train/grad_norm"] < np.inf
    assert found[-1] < found[0] - 0.5


def test_muon_orthogonalises_each_matrix_of_bdh():
    model = BDH(BDHShape(vocab=20, width=16, hidden=4 * 16))
    params = jax.jit(model.init)(jax.random.key(0))
    config = base().train
    config.update({"optimizer": "muon", "weight_decay": 0.0})
    chain = optim.make_optimizer(config, model.param_info())
    grads = jax.tree.map(lambda p: jnp.cos(1000 * p), params)
    direction, _ = jax.jit(chain.update)(grads, chain.init(params), params)
    for name in ("encoder", "encoder_v", "decoder"):
        values = np.linalg.svd(direction[name]["weight"], compute_uv=False)  # of each head
        assert np.all(values.max(-1) / values.min(-1) < 2), name


def test_bdh_refuses_neurons_that_make_no_heads():
    with pytest.raises(
        ValueError, match="hidden=36: must be an even number of neurons for each of 4 heads"
    ):
        BDHShape(hidden=36)


def test_bdh_jit_changes_nothing():
    model, params = bdh(0.3)
    inputs = jnp.asarray(make.tokens(SHAPE.vocab, 1, 6)[0])
    with jax.disable_jit():
        plain = model.apply(params, Batch(inputs))[0]
    np.testing.assert_allclose(
        jax.jit(model.apply)(params, Batch(inputs))[0], plain, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("std", make.BDH_STD.values())
def test_bdh_decoding_is_the_full_forward(std):
    model, params = bdh(std)
    inputs = jnp.asarray(make.tokens(SHAPE.vocab)[0])
    full = jax.jit(model.apply)(params, Batch(inputs))[0]
    decode = jax.jit(model.decode)
    first, cache = decode(params, inputs[:, :5], model.init_cache(2, 40), 0)
    np.testing.assert_allclose(first, full[:, :5], rtol=1e-5, atol=1e-5)
    for t in range(5, 40):
        one, cache = decode(params, inputs[:, t : t + 1], cache, t)
        np.testing.assert_allclose(one[:, 0], full[:, t], rtol=1e-4, atol=2e-5)


def test_bdh_continues_a_text_with_its_likeliest_tokens():
    model, params = bdh(0.3)
    text = jnp.asarray(make.tokens(SHAPE.vocab, 1, 4)[0])
    found = generate(model, params, text, 3, jax.random.key(0), Sampling(0.0))
    text, apply = np.pad(text, ((0, 0), (0, 3))), jax.jit(model.apply)
    for t in range(4, 7):  # what stands after a token does not change its logits
        text[:, t] = apply(params, Batch(text))[0][:, t - 1].argmax(-1)
    np.testing.assert_array_equal(found, text[:, 4:])


def test_bdh_documents_do_not_hear_each_other():
    model, params = bdh(0.3)
    inputs = jnp.asarray(make.tokens(SHAPE.vocab, 1, 12)[0])
    apply, segments = jax.jit(model.apply), np.array([[1] * 5 + [2] * 7])
    together = apply(params, Batch(inputs, segments=segments))[0]
    for part in (slice(0, 5), slice(5, 12)):
        alone = apply(params, Batch(inputs[:, part]))[0]
        np.testing.assert_allclose(together[:, part], alone, rtol=1e-4, atol=2e-5)
    one = apply(params, Batch(inputs, segments=0 * segments))[0]
    assert not np.allclose(together[:, 5:], one[:, 5:], atol=1e-2)


def test_basis_sharing_is_one_basis_for_neighbours_in_all_that_reads_the_stream():
    width, hidden, rank, stages = 16, 24, 2, 4
    config = base()
    config.data.context = 8
    config.update_from_flattened_dict(
        {k: v for k, v in MODELS["Basis Sharing"].items() if k.startswith("model.")}
    )
    config.model.update(
        {"groups": 2, "heads": 2, "p_inter": rank, "width": width, "hidden": hidden}
    )
    config.model.update({"prelude": stages, "core": 0, "coda": 0})
    validate(config)
    model = Decoder(model_shape(config, 20))
    params = jax.jit(model.init)(jax.random.key(0))
    found = generated(model, params)
    assert list(found) == [f"prelude {i + 1}" for i in range(stages)]

    def span(*names):  # of (stage, member): the dimensions that their W read
        return np.linalg.matrix_rank(
            np.concatenate([found[f"prelude {i}"][m] for i, m in names]), rtol=1e-5
        )

    for member in ("query", "key", "value", "gate", "up"):
        assert span((1, member), (2, member)) == span((3, member), (4, member)) == rank
        assert span((2, member), (3, member)) == 2 * rank
    for member in ("attention out", "down"):
        assert span((1, member), (2, member)) == 2 * rank
    # each kind of matrix has a basis of its own
    assert span((1, "query"), (1, "key"), (1, "value")) == 3 * rank

    bases = stages // 2 * (3 + 2) * width + stages * (width + hidden)
    coefficients = stages * (4 * width + 2 * hidden + width)
    assert count.parameters(params, model.param_info()).matrices == rank * (bases + coefficients)


def cola(exchange_activation):
    """The golden model of CoLA as a decoder: every synapse broadcasts, activated, and there is
    nothing beside that.
    """
    c, config = make.COLA, base()
    config.data.context = 40
    config.model.update(
        {"width": c["hidden_size"], "hidden": c["intermediate_size"], "p_inter": c["rank"]}
    )
    config.model.update({"groups": c["num_attention_heads"], "heads": c["num_attention_heads"]})
    config.model.update({"rule": "broadcast", "message_activation": "silu", "p_intra": 0})
    config.model.update({"exchange_activation": exchange_activation, "qk_norm": False})
    config.model.update({"prelude": c["num_hidden_layers"], "core": 0, "coda": 0})
    validate(config)
    w = {name: jnp.asarray(weight, jnp.float32) for name, weight in make.cola_weights().items()}

    def each_layer(value):
        return jnp.stack([value(f"model.layers.{i}.") for i in range(c["num_hidden_layers"])])

    def synapse(*names):
        def fan(end):
            return each_layer(
                lambda start: jnp.stack([w[f"{start}{name}_proj.{end}"] for name in names])
            )

        return {"inter_broadcast": {"pre": fan("cola_a"), "post": fan("cola_b").swapaxes(-1, -2)}}

    stages = {
        "attention_norm": {"scale": each_layer(lambda start: w[f"{start}input_layernorm.weight"])},
        "query_key_value": synapse("self_attn.q", "self_attn.k", "self_attn.v"),
        "attention_out": synapse("self_attn.o"),
        "exchange_norm": {
            "scale": each_layer(lambda start: w[f"{start}post_attention_layernorm.weight"])
        },
        "gate_up": synapse("mlp.gate", "mlp.up"),
        "down": synapse("mlp.down"),
    }
    params = {
        "embed": w["model.embed_tokens.weight"],
        "norm": {"scale": w["model.norm.weight"]},
        "prelude": stages,
    }
    return Decoder(model_shape(config, c["vocab_size"])), {
        **params,
        "unembed": w["lm_head.weight"].T,
    }


def test_the_broadcast_rule_with_silu_is_colas_layer():
    x, a, b = (jnp.asarray(array, jnp.float32) for array in make.cola_layer())
    y = ngc_jax.transmit("broadcast", x, a, b.T, activation="silu")
    np.testing.assert_allclose(y, golden("cola")["layer"]["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("exchange_activation", "name"),
    [("none", "low_rank_activation_only"), ("silu", "both_activations")],
)
def test_a_decoder_of_such_synapses_is_the_published_cola(exchange_activation, name):
    model, params = cola(exchange_activation)
    expected_tree = jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == expected_tree
    inputs = jnp.asarray(make.tokens(make.COLA["vocab_size"])[0])
    logits, _ = jax.jit(model.apply)(params, Batch(inputs))
    np.testing.assert_allclose(
        logits[..., :: make.COLA_COLUMNS], golden("cola")[name]["logits"], rtol=1e-5, atol=1e-5
    )
