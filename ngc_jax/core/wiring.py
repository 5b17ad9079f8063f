"""Who hears whom: wirings between groups, as tables of partners.

For: fixed topologies, drawn once before training, and moving states from one table to another. Not
for: what passes along a channel (`rules/`), or edges that change in training (`rewiring.py`).

A wiring is a tuple of G rows of k numbers: row g names, in ascending order, the groups that group g
hears. Every group hears equally many, so that channels make regular arrays and one that is absent
costs nothing. None has a channel from a group to itself, which is the synapse's intra-group part.
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Wiring = tuple[tuple[int, ...], ...]
REWIRED = 0.2  # of a small world's channels: many shortcuts, neighbourhoods still there


def others(groups: int, k: int, seed: int) -> Wiring:
    """Every group hears all the others: k = G - 1."""
    return ring(groups, groups - 1, seed)


def ring(groups: int, k: int, seed: int) -> Wiring:
    """Groups on a ring; each hears its k nearest, the one ahead first where k is odd."""
    return _table(_near(groups, k))


@functools.cache  # a model asks for it at each synapse
def small_world(groups: int, k: int, seed: int) -> Wiring:
    """A ring in which each channel, with probability REWIRED, comes from a random group instead.

    Watts and Strogatz 1998 (Nature 393), on channels that have a direction: a listener keeps its k.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for g, near in enumerate(_near(groups, k)):
        heard = set(near)
        for h in near:
            strangers = sorted(set(range(groups)) - heard - {g})
            if strangers and draw.random() < REWIRED:
                heard = heard - {h} | {int(draw.choice(strangers))}
        rows.append(heard)
    return _table(rows)


@functools.cache  # a model asks for it at each synapse
def regular(groups: int, k: int, seed: int) -> Wiring:
    """A random digraph in which each group hears k others and is heard by k.

    A ring whose channels trade listeners in pairs, 20 trials for each channel: the usual Markov
    chain over graphs with given degrees (Maslov and Sneppen 2002, Science 296).
    """
    draw = np.random.default_rng(seed)
    rows = [set(near) for near in _near(groups, k)]
    for _ in range(20 * groups * k):
        a, b = (int(g) for g in draw.integers(groups, size=2))
        h, i = (int(draw.choice(sorted(rows[g]))) for g in (a, b))
        if h not in rows[b] | {b} and i not in rows[a] | {a}:
            rows[a] = rows[a] - {h} | {i}
            rows[b] = rows[b] - {i} | {h}
    return _table(rows)


def block(groups: int, k: int, seed: int) -> Wiring:
    """Islands of k + 1 neighbours that hear each other and nobody else; k + 1 must divide G."""
    islands = (range(g - g % (k + 1), g - g % (k + 1) + k + 1) for g in range(groups))
    return _table([set(island) - {g} for g, island in enumerate(islands)])


WIRINGS: dict[str, Callable[[int, int, int], Wiring]] = {
    made.__name__: made for made in (others, ring, small_world, regular, block)
}
DYNAMIC = ("dynamic", "dynamic_ports")  # wirings that change: whole channels, or single ports


def channel_counts(wiring: str, groups: int) -> list[int]:
    """The numbers k of groups that each group can hear under a wiring that asks for one."""
    return [k for k in range(1, groups) if wiring != "block" or groups % (k + 1) == 0]


def slots_of(hears: Array, edges: int) -> Array:
    """For hears [..., k], the edge in each slot: the slot of each edge [..., edges], or -1."""
    found = hears[..., None, :] == jnp.arange(edges)[:, None]
    return jnp.where(jnp.any(found, axis=-1), jnp.argmax(found, axis=-1), -1)


def carry(states: Array, slots: Array) -> Array:
    """States [..., G, n, k, p] moved: slot s of [..., G, n, k', p] gets that of slots[..., g, s].

    Where slots [..., G, k'] is -1 there is 0. Bits are kept: nothing is multiplied.
    """
    index = slots[..., None, :, None]
    return jnp.where(index < 0, 0, jnp.take_along_axis(states, jnp.maximum(index, 0), axis=-2))


def _near(groups: int, k: int) -> list[list[int]]:
    """The k nearest of each group on a ring: at distance 1, -1, 2, -2, ..."""
    offsets = [(i // 2 + 1) * (-1) ** i for i in range(k)]
    return [[(g + offset) % groups for offset in offsets] for g in range(groups)]


def _table(rows: Iterable[Iterable[int]]) -> Wiring:
    return tuple(tuple(sorted(row)) for row in rows)
