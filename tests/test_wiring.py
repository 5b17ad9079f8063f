"""Wirings between groups: degrees, directions, islands, and that a seed is what decides."""

import numpy as np
import pytest

from ngc_jax.core.wiring import WIRINGS


def hears(name, groups, k, seed=0):
    """The wiring as a matrix of 0 and 1, [listener, speaker]."""
    table = np.zeros((groups, groups), int)
    for g, row in enumerate(WIRINGS[name](groups, k, seed)):
        assert list(row) == sorted(set(row))
        table[g, list(row)] = 1
    return table


@pytest.mark.parametrize(("name", "groups", "k"), [(n, 12, 5) for n in WIRINGS if n != "others"] + [("others", 12, 11)])
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
