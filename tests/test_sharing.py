"""Shared send states: what a sharing says, that it is the unshared model with equal states, and
what it saves.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax import count
from ngc_jax.config import base, model_shape, validate
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.sharing import parse
from ngc_jax.nn.synapse import Synapse
from ngc_jax.runtime.errors import UserError


def build(sharing, **fields):
    config = base()
    config.data.context = 8
    config.model.update(
        {"width": 16, "hidden": 24, "groups": 4, "heads": 2, "p_intra": 2, "p_inter": 2}
    )
    config.model.update({"prelude": 1, "core": 0, "coda": 2, "sharing": sharing, **fields})
    validate(config)
    return Decoder(model_shape(config, 20))


def test_what_a_sharing_says():
    assert parse("none", 3).of("query_key_value") == (0, 1, 2)
    assert parse("qkv", 3).of("query_key_value") == (0, 0, 0)
    assert parse("qkv", 3).of("gate_up") == (0, 1)
    assert parse("key+value", 3).of("query_key_value") == (0, 1, 1)
    assert parse("query+value,key+value", 1).of("query_key_value") == (0, 0, 0)
    assert parse("depth2", 5).stages == (0, 0, 1, 1, 2)
    assert parse("depth3,gate_up", 4).stages == (0, 0, 0, 1)
    assert parse("1+3", 4).stages == (0, 1, 0, 2)
    assert parse("depth2,readers", 4).stages == (0, 0, 1, 1)
    assert parse("depth2", 4).over_depth == ("query_key_value", "attention_out", "gate_up", "down")
    assert parse("depth2,readers", 4).over_depth == ("query_key_value", "gate_up")


@pytest.mark.parametrize("text", ["qvk", "query+gate", "query", "depth0", "1+9", "", "query+1"])
def test_nonsense_is_refused_with_something_that_works(text):
    with pytest.raises(
        UserError,
        match=r"model.sharing=.*is no preset \(qkv, gate_up, depth2, depth3, readers\), nor a set",
    ):
        build(text)


def test_readers_share_over_depth_or_not_at_all():
    with pytest.raises(UserError, match=r"model.sharing='qkv,readers': .*none do: add 'depth2'"):
        build("qkv,readers")


@pytest.mark.parametrize(
    ("sharing", "rule"), [("qkv,depth2", "addressed"), ("key+value,gate_up,1+3", "metric")]
)
def test_a_shared_model_is_the_unshared_one_with_equal_states(sharing, rule):
    """Same logits; and the gradient of a shared state is the sum of those of its copies."""
    shared, plain = build(sharing, rule=rule), build("none", rule=rule)
    params = jax.jit(shared.init)(jax.random.key(0))
    batch = Batch(jax.random.randint(jax.random.key(1), (2, 8), 0, 20))

    def spread(params):
        """Each member of a fan, in each stage, with send states of its own."""

        def copy(path, leaf):
            names = {key.key for key in path}
            fan = names & {"query_key_value", "gate_up"}
            if not fan or "pre" not in names:
                return leaf
            return leaf[:, np.array(shared.shape.shared.of(fan.pop()))]

        return jax.tree_util.tree_map_with_path(copy, shared.expand_shared(params))

    def loss(model, params):
        return jnp.sum(jnp.sin(model.apply(params, batch)[0]))

    @jax.jit
    def both(params):
        pulled = jax.value_and_grad(lambda p: loss(plain, spread(p)))
        return jax.value_and_grad(lambda p: loss(shared, p))(params), pulled(params)

    copied, info = jax.eval_shape(spread, params), plain.param_info()
    assert jax.tree.structure(copied) == jax.tree.structure(info)
    (value, grads), (expected, wanted) = both(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), grads, wanted)
    fewer = count.parameters(params, shared.param_info()).matrices
    assert fewer < count.parameters(copied, info).matrices


def test_qkv_sharing_saves_two_thirds_of_the_sending():
    """XLA's own count of the compiled synapse; sending alone is a synapse whose receivers are one
    neuron a group.
    """
    shape = build("none", width=256, p_intra=0, p_inter=8, form="signals").shape
    x = jnp.zeros((64, 256))

    def flops(senders):
        synapse = Synapse(shape.parts(256, 4), 256, 4, "signals", senders)
        params = jax.eval_shape(synapse.init, jax.random.key(0), x)
        return jax.jit(synapse.apply).lower(params, x).compile().cost_analysis()["flops"]

    receiving = 3 * 2 * 64 * 4 * 4 * 8
    assert flops((0, 0, 0)) - receiving <= 0.4 * (flops((0, 1, 2)) - receiving)
