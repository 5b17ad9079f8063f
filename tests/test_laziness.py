"""Rich or lazy: ranks, movement and tangent kernels, against NumPy and explicit Jacobians; ranks at
start.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.learning import effective_ranks, generated, logit_kernel, movements
from experiments.tangent_kernel import alignment, effective_rank, movement, tangent_kernel
from ngc_jax.config import base, model_shape, validate
from ngc_jax.data.batches import Batch
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.synapse import Synapse


def build(**fields):
    config = base()
    config.data.context = 4
    config.model.update(
        {"width": 16, "hidden": 16, "groups": 2, "heads": 2, "p_inter": 2, "init_rank": 4}
    )
    config.model.update({"prelude": 1, "core": 0, "coda": 0, **fields})
    validate(config)
    return Decoder(model_shape(config, 5))


@pytest.fixture(scope="module")
def dense():
    model = build(rule="dense", init_rank=3)
    return model, jax.jit(model.init)(jax.random.key(0))


def test_effective_rank_is_the_entropy_of_singular_values():
    drawn = np.random.default_rng(0).normal(size=(3, 7, 5))
    known = np.stack([3 * np.eye(7, 5), np.ones((7, 5)), np.zeros((7, 5))])
    found = effective_rank(jnp.asarray(np.concatenate([drawn, known]), jnp.float32))
    for rank, matrix in zip(found, drawn, strict=False):
        values = np.linalg.svd(matrix)[1]
        entropy = -sum(v / values.sum() * np.log(v / values.sum()) for v in values)
        assert rank == pytest.approx(np.exp(entropy), rel=1e-4)
    assert found[3:] == pytest.approx([5, 1, 0], rel=1e-4)


def test_a_sum_of_parts_starts_with_the_rank_that_was_asked_for():
    """A block inside groups and messages between them, whose senders are of the same kinds."""
    shape = build(init_rank=4).shape
    synapse = Synapse(shape.parts(16, 24), 16, 24, "weights", senders=(0, 0))
    sent, params = jax.jit(synapse.init_with_output)(jax.random.key(0), jnp.eye(16))
    assert set(params["params"]) == {"intra_block", "inter_addressed"}
    for w in np.moveaxis(sent, 1, 0):
        assert np.linalg.matrix_rank(w, rtol=1e-4) == 4
        assert np.var(16**0.5 * w) == pytest.approx(1, abs=0.3)


def test_a_dense_model_starts_with_the_rank_that_was_asked_for(dense):
    found, soft = generated(*dense), effective_ranks(*dense)
    assert list(found["prelude 1"]) == [
        "query",
        "key",
        "value",
        "attention out",
        "gate",
        "up",
        "down",
    ]
    np.testing.assert_array_equal(
        found["prelude 1"]["up"], dense[1]["prelude"]["gate_up"]["dense_block"]["weight"][0, 1, 0]
    )
    for name, w in found["prelude 1"].items():
        assert np.linalg.matrix_rank(w, rtol=1e-4) == 3, name
        assert 2 < soft["prelude 1"][name] <= 3 * (1 + 1e-5), name


def test_movement_is_relative_and_by_kind():
    model = build(p_intra=0)
    before = {**jax.eval_shape(model.init, jax.random.key(0))}
    before = jax.tree.map(lambda leaf: np.zeros(leaf.shape), before)
    before["embed"] += 1
    before["prelude"]["down"]["inter_addressed"]["pre"] += 1
    after = jax.tree.map(np.copy, before)
    after["prelude"]["down"]["inter_addressed"]["post"][0, 0, 0, 0, 0, 0] = 3
    before["norm"]["scale"] += 2
    after["norm"]["scale"] += 3
    sent = before["prelude"]["down"]["inter_addressed"]["pre"].size
    wanted = {"embedding": 0, "state": 3 / np.sqrt(sent), "scale": 1 / 2}
    assert movements(model, before, after) == pytest.approx(wanted)
    assert movement({"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([3.0, 5.0])}) == pytest.approx(
        0.2
    )


def test_the_tangent_kernel_is_that_of_the_explicit_jacobian():
    x = jax.random.normal(jax.random.key(1), (6, 3))
    params = {"a": jax.random.normal(jax.random.key(2), (3, 4)), "b": jnp.array(0.5)}

    def function(params, x):
        return jnp.sum(jnp.tanh(x @ params["a"] + params["b"]))

    jacobian = jax.jacobian(lambda params: jax.vmap(lambda x: function(params, x))(x))(params)
    flat = np.concatenate(
        [np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], axis=1
    )
    expected = np.array(
        [[sum(p * q for p, q in zip(a, b, strict=True)) for a in flat] for b in flat]
    )
    # two blocks, one not full
    found = jax.jit(lambda params: tangent_kernel(function, params, x, block=4))(params)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kernels_align_by_their_angle():
    a, b = (m @ m.T for m in np.random.default_rng(0).normal(size=(2, 5, 3)))
    cosine = np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b))
    assert alignment(jnp.asarray(a), jnp.asarray(b)) == pytest.approx(cosine, rel=1e-5)
    assert alignment(jnp.asarray(a), 7 * jnp.asarray(a)) == pytest.approx(1, rel=1e-5)


def test_projections_estimate_the_kernel_of_all_logits(dense):
    """The mean over random signs of u^T (J J^T) u, against the trace over outputs of the explicit J
    J^T.
    """
    model, params = dense
    batch = Batch(jax.random.randint(jax.random.key(3), (3, 4), 0, 5))
    stages = params["prelude"]
    synapses = {
        name: stages[name] for name in ("query_key_value", "attention_out", "gate_up", "down")
    }

    def logits(synapses):
        return model.apply({**params, "prelude": stages | synapses}, batch)[0]

    found, jacobian = jax.jit(
        lambda p, s: (logit_kernel(model, p, batch, projections=128), jax.jacrev(logits)(s))
    )(params, synapses)
    rows = [np.asarray(leaf).reshape(3, 4 * 5, -1) for leaf in jax.tree.leaves(jacobian)]
    full = np.concatenate(rows, axis=2)
    expected = np.einsum("aop,bop->ab", full, full)
    assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected)
