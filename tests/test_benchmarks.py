"""What the benchmarks rest on: models of the share that a table names, and references that see a
wrong number.
"""

import argparse
from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import fused, numerics, speed
from ngc_jax.core.rules import RULES, transmit
from ngc_jax.training.match_size import cost

ARGS = argparse.Namespace(stages=2, context=128, batch_size=4, dtype="float32")


def test_ngc_has_the_share_of_dense_that_the_table_is_about():
    dense, ngc = speed.models(512, 8, ARGS)
    assert cost(ngc) / cost(dense) == pytest.approx(speed.SHARE, rel=0.1)
    assert (ngc.model.width, ngc.model.heads, ngc.model.prelude) == (
        dense.model.width,
        dense.model.heads,
        2,
    )


def test_the_reference_is_in_float64_and_an_error_of_one_part_in_1e4_shows():
    rng = np.random.default_rng(0)
    x, pre, post = (rng.standard_normal(shape, np.float32) for shape in ((5, 24), (24, 3), (16, 3)))
    reference = numerics.in_float64(lambda *a: transmit("broadcast", *a), x, pre, post)
    assert reference.dtype == np.float64
    limit = numerics.LIMITS["highest"]
    assert numerics.error(transmit("broadcast", x, pre, post), reference) < limit
    assert numerics.error(transmit("broadcast", x, pre, post * (1 + 1e-4)), reference) > limit


def test_the_kernel_is_the_rule():
    pre, post = jax.jit(partial(RULES["distance"].init, groups=1, n_in=12, n_out=8, dim=3))(
        jax.random.key(0)
    )
    post = {**post, "gain": post["gain"] * np.array([1, -2, 0.5], np.float32)}
    x = jax.random.normal(jax.random.key(1), (8, 12))
    found = jax.jit(partial(fused.product, tile=4, interpret=True))(x, pre, post)
    np.testing.assert_allclose(found, transmit("distance", x, pre, post), rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match="tile=8: must divide the 8 tokens and the 12 and 8 neurons"
    ):
        fused.product(x, pre, post, tile=8, interpret=True)
