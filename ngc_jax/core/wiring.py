"""Who hears whom: wirings between groups, as tables of partners.

For: fixed topologies, and moving states from one to another. Not for: what passes along a channel
(`rules/`), or edges that change in training (`rewiring.py`). A wiring is G rows of k numbers: row g
names, in ascending order, the groups that group g hears; never itself, the intra-group part.
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
    """A ring, each channel from a random group instead by chance REWIRED (1998, Nature 393)."""
    draw = np.random.default_rng(seed)
    rows = [set(near) for near in _near(groups, k)]
    for g, near in enumerate(_near(groups, k)):
        for h in near:
            strangers = sorted(set(range(groups)) - rows[g] - {g})
            if strangers and draw.random() < REWIRED:
                rows[g] = rows[g] - {h} | {int(draw.choice(strangers))}
    return _table(rows)


@functools.cache  # a model asks for it at each synapse
def regular(groups: int, k: int, seed: int) -> Wiring:
    """A random digraph in which each group hears k others and is heard by k."""
    # A ring whose channels trade listeners, 20 trials each (Maslov and Sneppen 2002, Science 296).
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
    """States [..., G, n, k, p] in the order of slots [..., G, k'], 0 where -1; bits are kept."""
    index = slots[..., None, :, None]
    return jnp.where(index < 0, 0, jnp.take_along_axis(states, jnp.maximum(index, 0), axis=-2))


def _near(groups: int, k: int) -> list[list[int]]:
    """The k nearest of each group on a ring: at distance 1, -1, 2, -2, ..."""
    offsets = [(i // 2 + 1) * (-1) ** i for i in range(k)]
    return [[(g + offset) % groups for offset in offsets] for g in range(groups)]


def _table(rows: Iterable[Iterable[int]]) -> Wiring:
    return tuple(tuple(sorted(row)) for row in rows)
