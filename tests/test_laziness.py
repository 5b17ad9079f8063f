"""Rich or lazy: ranks, movement and tangent kernels, against NumPy and explicit Jacobians; ranks at start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ngc_jax.config import base, model_shape, validate
from ngc_jax.core.laziness import alignment, effective_rank, movement, tangent_kernel
from ngc_jax.nn.decoder import Decoder
from ngc_jax.stability.learning import effective_ranks, generated, logit_kernel, movements


def build(**fields):
    config = base()
    config.data.context = 4
    config.model.update({"width": 16, "hidden": 24, "groups": 2, "heads": 2, "p_inter": 2, "init_rank": 4})
    config.model.update({"prelude": 1, "core": 0, "coda": 0, **fields})
    validate(config)
    return Decoder(model_shape(config, 5))


@pytest.fixture(scope="module")
def ngc():
    model = build()
    return model, jax.jit(model.init)(jax.random.key(0))


def test_effective_rank_is_the_entropy_of_singular_values():
    w = np.random.default_rng(0).normal(size=(3, 7, 5))
    for found, matrix in zip(effective_rank(jnp.asarray(w, jnp.float32)), w, strict=True):
        values = np.linalg.svd(matrix)[1]
        entropy = -sum(v / values.sum() * np.log(v / values.sum()) for v in values)
        assert found == pytest.approx(np.exp(entropy), rel=1e-4)
    assert effective_rank(3 * jnp.eye(4)) == pytest.approx(4, rel=1e-5)
    assert effective_rank(jnp.ones((4, 6))) == pytest.approx(1, rel=1e-4)
    assert effective_rank(jnp.zeros((4, 6))) == 0


def test_weights_start_with_the_rank_that_was_asked_for(ngc):
    """The same of a dense model, whose rank need be no multiple of anything."""
    dense = build(rule="dense", init_rank=3)
    for rank, model, params in [(4, *ngc), (3, dense, jax.jit(dense.init)(jax.random.key(0)))]:
        found, soft = generated(model, params), effective_ranks(model, params)
        (stage,) = found
        assert list(found[stage]) == ["query", "key", "value", "attention out", "gate", "up", "down"]
        for name, w in found[stage].items():
            assert np.linalg.matrix_rank(w, rtol=1e-4) == rank, name
            assert 0.6 * rank < soft[stage][name] <= rank * (1 + 1e-5), name


def test_movement_is_relative_and_by_kind():
    before = {"embed": np.ones(4), "prelude": {"down": {"inter_x": {"pre": np.ones(3), "post": np.zeros(1)}}}}
    after = {"embed": np.ones(4), "prelude": {"down": {"inter_x": {"pre": np.ones(3), "post": np.full(1, 3.0)}}}}
    assert movements(before, after) == pytest.approx({"embedding": 0, "state": np.sqrt(3)})
    assert movement({"a": jnp.array([3.0, 4.0])}, {"a": jnp.array([3.0, 5.0])}) == pytest.approx(0.2)


def test_the_tangent_kernel_is_that_of_the_explicit_jacobian():
    x = jax.random.normal(jax.random.key(1), (6, 3))
    params = {"a": jax.random.normal(jax.random.key(2), (3, 4)), "b": jnp.array(0.5)}

    def function(params, x):
        return jnp.sum(jnp.tanh(x @ params["a"] + params["b"]))

    jacobian = jax.jacobian(lambda params: jax.vmap(lambda x: function(params, x))(x))(params)
    flat = np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    expected = np.array([[sum(p * q for p, q in zip(a, b, strict=True)) for a in flat] for b in flat])
    for block in (4, 32):  # two blocks, one of them not full; one that is larger than needed
        found = jax.jit(lambda params, block=block: tangent_kernel(function, params, x, block))(params)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_kernels_align_by_their_angle():
    a, b = (m @ m.T for m in np.random.default_rng(0).normal(size=(2, 5, 3)))
    cosine = np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b))
    assert alignment(jnp.asarray(a), jnp.asarray(b)) == pytest.approx(cosine, rel=1e-5)
    assert alignment(jnp.asarray(a), 7 * jnp.asarray(a)) == pytest.approx(1, rel=1e-5)


def test_projections_estimate_the_kernel_of_all_logits(ngc):
    """The mean over random signs of u^T (J J^T) u, against the trace over outputs of the explicit J J^T."""
    model, params = ngc
    tokens = jax.random.randint(jax.random.key(3), (3, 4), 0, 5)
    stages = params["prelude"]
    synapses = {name: stages[name] for name in ("query_key_value", "attention_out", "gate_up", "down")}

    @jax.jit
    def jacobian(synapses):
        return jax.jacrev(lambda s: model.apply({**params, "prelude": stages | s}, tokens)[0])(synapses)

    rows = [np.asarray(leaf).reshape(3, 4 * 5, -1) for leaf in jax.tree.leaves(jacobian(synapses))]
    full = np.concatenate(rows, axis=2)
    expected = np.einsum("aop,bop->ab", full, full)
    found = jax.jit(lambda p: logit_kernel(model, p, tokens, projections=128))(params)
    assert np.linalg.norm(found - expected) < 0.15 * np.linalg.norm(expected)
