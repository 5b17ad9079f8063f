"""Wirings that change in training: how many edges when, which are given up, which are tried.

For: the schedule, what an edge is worth, and the choice. Not for: the rule whose edges these are
(`addressed.Rewirable`), or doing it to a model (`training/rewiring.py`). Axes: G listening groups,
n and m neurons of a group on either side, E possible edges of a group, p numbers of one; T tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ngc_jax.core.wiring import slots_of

Array = jax.Array
REGROW = ("gradient", "correlation", "random")  # what may speak for an edge that is not there


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When a wiring changes, and to how many edges a group.

    Rewiring i = 1 .. count comes after update begin + i every. The number of edges falls as a cubic
    from `first` to `last` (arXiv 1710.01878; GraNet, arXiv 2106.10404); the share exchanged falls
    as a cosine from `exchange` to 0 (RigL, arXiv 1911.11134).
    """

    first: int  # edges of a group at the start, >= last
    last: int  # and in the end, >= 1
    begin: int  # updates
    every: int  # updates, >= 1
    count: int  # rewirings, >= 1
    exchange: float  # in [0, 1]

    def due(self, step: int) -> bool:
        """Whether a rewiring comes after update `step`."""
        i, rest = divmod(step - self.begin, self.every)
        return rest == 0 and 1 <= i <= self.count

    def edges(self, step: int) -> int:
        """Edges of a group after update `step`, and after the rewiring where one is due."""
        return round(self.last + (self.first - self.last) * (1 - self._passed(step)) ** 3)

    def exchanged(self, step: int) -> int:
        """Edges that a rewiring at `step` gives to the most promising; one at least stays."""
        share = self.exchange / 2 * (1 + math.cos(math.pi * self._passed(step)))
        return min(round(share * self.edges(step)), self.edges(step) - 1)

    def _passed(self, step: int) -> float:
        """The share of rewirings that are done."""
        return min(max((step - self.begin) // self.every, 0), self.count) / self.count


def magnitude(pre: Array, post: Array) -> Array:
    """Frobenius norm of each edge's weights: pre [..., G, n, E, p], post alike -> [..., G, E]."""
    read, sent = (jnp.einsum("...giep,...gieq->...gepq", states, states) for states in (post, pre))
    return jnp.sqrt(jnp.maximum(jnp.sum(read * sent, axis=(-2, -1)), 0))


def slope(gradient: Array) -> Array:
    """RigL's score, the gradient's norm by an edge's post: [..., G, m, E, p] -> [..., G, E]."""
    return jnp.sqrt(jnp.sum(jnp.square(gradient), axis=(-3, -1)))


def correlation(signal: Array, heard: Array) -> Array:
    """How much an edge's signal [T, G, E, p] goes with what is received [T, G, m]: [G, E].

    The mean of |Pearson's correlation over tokens|; after G2GNet (arXiv 2508.14140), for groups.
    """
    a, b = (z - jnp.mean(z, axis=0) for z in (signal, heard))
    a, b = (z * jax.lax.rsqrt(jnp.sum(jnp.square(z), axis=0) + 1e-12) for z in (a, b))
    return jnp.mean(jnp.abs(jnp.einsum("tgep,tgj->gepj", a, b)), axis=(-2, -1))


def choose(
    strength: Array, promise: Array, keep: Array, grow: Array, slots: int
) -> tuple[Array, Array]:
    """The edges from now on: [..., slots], and which slots are used, bool, by scores [..., E].

    The `keep` strongest stay, and of those that were not there the `grow` most promising are added;
    where these are too few, the best of those given up come back. Used slots come first, in order
    of edges. strength < 0 is of an edge that is not there; promise >= 0; keep + grow <= slots.
    """
    edges = strength.shape[-1]
    kept = _rank(strength) < keep
    turn = _rank(jnp.nan_to_num(promise)) + edges * (strength >= 0) + edges * kept
    grown = _rank(-turn) < grow
    place = _rank(-jnp.where(kept | grown, 0, edges) - jnp.arange(edges))
    heard = slots_of(place, slots).astype(jnp.int32)
    return heard, jnp.broadcast_to(jnp.arange(slots) < keep + grow, heard.shape)


def _rank(score: Array) -> Array:
    """0 for the highest of the last axis, 1 for the next. (Not a sort: those compile slowly.)"""
    mine, other = score[..., :, None], score[..., None, :]
    earlier = jnp.tri(score.shape[-1], k=-1, dtype=bool)
    return jnp.sum((other > mine) | ((other == mine) & earlier), axis=-1)
