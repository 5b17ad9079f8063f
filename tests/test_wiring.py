"""Wirings between groups: who hears whom, that a seed decides it, and that only the channels there
are act and cost.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngc_jax
from ngc_jax.analysis import gain_bound
from ngc_jax.core.rules.addressed import Addressed
from ngc_jax.core.wiring import WIRINGS


def hears(name, groups, k, seed=0):
    """The wiring as a matrix of 0 and 1, [listener, speaker]."""
    table = np.zeros((groups, groups), int)
    for g, row in enumerate(WIRINGS[name](groups, k, seed)):
        assert list(row) == sorted(set(row))
        table[g, list(row)] = 1
    return table


@pytest.mark.parametrize(
    ("name", "groups", "k"), [(n, 12, 5) for n in WIRINGS if n != "others"] + [("others", 12, 11)]
)
def test_every_group_hears_k_others(name, groups, k):
    table = hears(name, groups, k)
    assert (table.sum(1) == k).all()
    assert not np.diagonal(table).any()


@pytest.mark.parametrize("k", [1, 2, 7, 14])
def test_regular_is_heard_by_k_as_well_and_is_no_ring(k):
    table = hears("regular", 16, k)
    assert (table.sum(0) == k).all()
    assert (table != hears("ring", 16, k)).any()


def test_ring_is_the_nearest():
    assert WIRINGS["ring"](6, 3, 0)[0] == (1, 2, 5)
    assert WIRINGS["ring"](2, 1, 0) == ((1,), (0,))


def test_small_world_is_a_ring_with_some_shortcuts():
    ring, world = hears("ring", 64, 6), hears("small_world", 64, 6)
    kept = (ring & world).sum() / ring.sum()
    assert 0.7 < kept < 0.9


def test_block_is_islands():
    table = hears("block", 8, 3)
    assert not table[:4, 4:].any()
    assert not table[4:, :4].any()


@pytest.mark.parametrize("name", ["small_world", "regular"])
def test_the_seed_decides(name):
    assert WIRINGS[name](16, 4, 1) == WIRINGS[name](16, 4, 1)
    assert WIRINGS[name](16, 4, 1) != WIRINGS[name](16, 4, 2)


G, N_IN, N_OUT, DIM = 8, 24, 16, 2
NARROW = [("ring", 3), ("small_world", 3), ("regular", 2), ("block", 3), ("others", 7)]


def channels(name, k, key=0):
    rule = Addressed(WIRINGS[name](G, k, 0))
    return rule, *rule.init(jax.random.key(key), G, N_IN, N_OUT, DIM)


def as_complete(rule, pre, post):
    """The same channels as states of the complete wiring, all others 0: what a mask would make."""
    n, m = N_IN // G, N_OUT // G
    full_pre, full_post = np.zeros((G, n, G, DIM)), np.zeros((G, m, G, DIM))
    for g, row in enumerate(rule.wiring):
        for s, h in enumerate(row):
            full_pre[h, :, g] = pre[g, :, s]
            full_post[g, :, h] = post[g, :, s]
    return jnp.asarray(full_pre, jnp.float32), jnp.asarray(full_post, jnp.float32)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("name", "k"), NARROW)
def test_gathered_channels_are_the_masked_product(name, k, activation):
    rule, pre, post = channels(name, k)
    x = jax.random.normal(jax.random.key(1), (5, N_IN))
    masked = as_complete(rule, pre, post)
    y = ngc_jax.transmit(rule, x, pre, post, activation)
    np.testing.assert_allclose(y, ngc_jax.transmit("addressed", x, *masked, activation), atol=2e-6)
    one = None if activation is None else x[0]
    formed = ngc_jax.weights(rule, pre, post, one, activation)
    np.testing.assert_allclose(
        formed, ngc_jax.weights("addressed", *masked, one, activation), atol=2e-6
    )
    np.testing.assert_allclose(y[0], formed @ x[0], atol=2e-6)
    blocks = np.asarray(formed).reshape(G, N_OUT // G, G, N_IN // G)
    assert ((np.abs(blocks).sum((1, 3)) > 0) == hears(name, G, k)).all()


@pytest.mark.parametrize(("name", "k"), NARROW)
def test_wired_channels_start_at_unit_variance(name, k):
    rule = Addressed(WIRINGS[name](G, k, 0))
    x = jax.random.normal(jax.random.key(1), (256, 512))
    y = ngc_jax.transmit(rule, x, *rule.init(jax.random.key(2), G, 512, 768, 8))
    assert 0.9 < float(jnp.var(y)) < 1.1


@pytest.mark.parametrize(("name", "k"), NARROW)
def test_the_bound_holds_for_channels(name, k):
    rule, pre, post = channels(name, k)
    norm = np.linalg.norm(ngc_jax.weights(rule, pre, post), 2)
    assert norm <= float(gain_bound([(rule, pre, post)])) <= 3 * norm


def test_channels_that_are_not_there_cost_nothing():
    """XLA's own count of the compiled synapse: a quarter of the groups heard, about a quarter of
    the products.
    """
    tokens, groups, width = 64, 16, 256

    def flops(rule):
        pre, post = rule.init(jax.random.key(0), groups, width, width, 2)
        x = jnp.zeros((tokens, width))
        cost = (
            jax.jit(lambda x, pre, post: ngc_jax.transmit(rule, x, pre, post))
            .lower(x, pre, post)
            .compile()
        )
        return cost.cost_analysis()["flops"]

    assert flops(Addressed(WIRINGS["regular"](groups, 4, 0))) <= 0.35 * flops(Addressed())
