"""The published baselines, BDH and CoLA: their authors' code's numbers (golden/make.py), and what the harness needs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from golden import make

from ngc_jax import optim
from ngc_jax.nn.bdh import BDH, BDHShape
from ngc_jax.sample import generate

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
    chosen = jax.nn.log_softmax(model.apply(params, inputs)[0])
    return -jnp.take_along_axis(chosen, targets[..., None], axis=-1).mean()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("name", make.BDH_STD)
def test_bdh_is_the_published_function(name, remat):
    expected = golden("bdh")[name]
    model, params = bdh(make.BDH_STD[name], remat=remat)
    inputs, targets = map(jnp.asarray, make.tokens(SHAPE.vocab))
    logits, _ = jax.jit(model.apply)(params, inputs)
    np.testing.assert_allclose(logits[..., :: make.BDH_COLUMNS], expected["logits"], rtol=1e-5, atol=1e-5)
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
    assert jax.tree.leaves(optim.kinds(params)).count("matrix") == 3
    assert optim.kinds(params)["embed"] == optim.kinds(params)["unembed"] == "embedding"


def test_bdh_refuses_neurons_that_make_no_heads():
    with pytest.raises(ValueError, match="hidden=36: must be an even number of neurons for each of 4 heads"):
        BDHShape(hidden=36)


def test_bdh_jit_changes_nothing():
    model, params = bdh(0.3)
    inputs = jnp.asarray(make.tokens(SHAPE.vocab, 1, 6)[0])
    with jax.disable_jit():
        plain = model.apply(params, inputs)[0]
    np.testing.assert_allclose(jax.jit(model.apply)(params, inputs)[0], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("std", make.BDH_STD.values())
def test_bdh_decoding_is_the_full_forward(std):
    model, params = bdh(std)
    inputs = jnp.asarray(make.tokens(SHAPE.vocab)[0])
    full = jax.jit(model.apply)(params, inputs)[0]
    decode = jax.jit(model.decode)
    first, cache = decode(params, inputs[:, :5], model.init_cache(2, 40), 0)
    np.testing.assert_allclose(first, full[:, :5], rtol=1e-5, atol=1e-5)
    for t in range(5, 40):
        one, cache = decode(params, inputs[:, t : t + 1], cache, t)
        np.testing.assert_allclose(one[:, 0], full[:, t], rtol=1e-4, atol=2e-5)


def test_bdh_continues_a_text_with_its_likeliest_tokens():
    model, params = bdh(0.3)
    text = jnp.asarray(make.tokens(SHAPE.vocab, 1, 4)[0])
    found = generate(model, params, text, 3, jax.random.key(0), jnp.float32(0), jnp.float32(1))
    for _ in range(3):
        text = jnp.append(text, model.apply(params, text)[0][:, -1:].argmax(-1), axis=1)
    np.testing.assert_array_equal(found, text[:, 4:])


def test_bdh_documents_do_not_hear_each_other():
    model, params = bdh(0.3)
    inputs = jnp.asarray(make.tokens(SHAPE.vocab, 1, 12)[0])
    together = model.apply(params, inputs, jnp.array([[1] * 5 + [2] * 7]))[0]
    np.testing.assert_allclose(together[:, :5], model.apply(params, inputs[:, :5])[0], rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(together[:, 5:], model.apply(params, inputs[:, 5:])[0], rtol=1e-4, atol=2e-5)
    assert not np.allclose(together[:, 5:], model.apply(params, inputs)[0][:, 5:], atol=1e-2)
