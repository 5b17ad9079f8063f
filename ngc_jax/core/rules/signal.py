"""The signal rules: W is a sum of products, so neurons send a few numbers and groups read them.

For: `broadcast`, `leaders`, `metric` and its small forms, `within`, `block`. Not for: `addressed`
(`addressed.py`), or using a rule by its name (`__init__.py`, whose axes these are).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.params import ParamInfo
from ngc_jax.core.rules.base import Sides, SignalRule, States, normal, per_group

Array = jax.Array
FEW = 8  # tokens below which a product takes as long as reading its states: read them as they lie


class Broadcast(SignalRule):
    """W[j, i] = sum_r R[j, r] S[i, r]: every neuron hears the same r numbers. As a layer: low rank.

    pre S [n_in, r], post R [n_out, r]. r (n_in + n_out) parameters, 2 FLOPs a token each, rank r.
    """

    grouped = False
    spoken, heard = (None,), (None,)

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        send, receive = jax.random.split(key)
        return normal(send, (n_in, dim), n_in), normal(receive, (n_out, dim), dim)

    def send(self, x: Array, pre: States) -> Array:
        return x @ pre

    def receive(self, signal: Array, post: States) -> Array:
        return signal @ post.T

    def weights(self, pre: States, post: States) -> Array:
        return post @ pre.T


class Leaders(SignalRule):
    """W = c [S; K S], its rows in an order: r receivers are the signal, the others hear them.

    pre S [r, n_in], a leader's own weights in each row, as a processor reads them soonest where
    there is one token; post {"state": K [n_out - r, r], "gain": c [], "order": int32 [n_out], where
    each receiver lies among leaders, then others}. r (n_in + n_out - r) + 1 parameters, 2 FLOPs a
    token each, rank r: `Broadcast` without the r^2 numbers that change nothing, and dense where r
    is the smaller side. At the start leaders lie evenly among receivers. Source: PIFA (arXiv
    2501.19090), read as neurons whose post states are one-hot.
    """

    grouped = False
    amplitude = ("gain",)
    spoken, heard = (None,), (None,)

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        if dim > min(n_in, n_out):
            raise ValueError(f"dim={dim}: must be at most {min(n_in, n_out)}, the smaller side")
        send, receive = jax.random.split(key)
        leads = np.isin(np.arange(n_out), np.arange(dim) * n_out // dim)
        order = np.where(leads, np.cumsum(leads), dim + np.cumsum(~leads)) - 1
        post = {"state": normal(receive, (n_out - dim, dim), dim), "gain": jnp.ones(())}
        return normal(send, (dim, n_in), n_in), post | {"order": jnp.array(order, jnp.int32)}

    def senders(self, pre: States) -> int:
        return int(pre.shape[1])

    def info(self, pre: States, post: States) -> tuple[Any, Any]:
        rows = ParamInfo("state", (None, "channel"), side="pre", matrix=-2)
        return rows, super().info((), post)[1]

    def alike(self, pre: States, post: States, kind: Array) -> Sides:
        tied = Broadcast().alike(pre.T, post["state"], kind)[0].T
        return tied, self.rescale(tied, post)

    def send(self, x: Array, pre: States) -> Array:
        return x @ pre.T

    def receive(self, signal: Array, post: States) -> Array:
        every = jnp.concatenate([signal, signal @ post["state"].T], axis=-1)
        return post["gain"] * jnp.take(every, post["order"], axis=-1, mode="clip")

    def weights(self, pre: States, post: States) -> Array:
        return self.receive(pre.T, post).T


class Metric(SignalRule):
    """W[gj, hi] = R[g, j] . M[g, h] S[h, i]: a map for each pair of groups compares states.

    pre S [G, n, r], post {"state": R [G, m, r], "map": M [G, G, r, r]}. r (n_in + n_out) + G^2 r^2
    parameters, twice that in FLOPs per token, rank up to min(n_in, n_out, G r). Source: ours.
    """

    amplitude = ("state",)
    spoken, heard = ("group", None), (None, None)
    pairs = "ghpq"  # the axes of M: listening group, speaking group, number read, number sent
    sent = "q"  # a diagonal or scalar map leaves numbers where they are

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        n, m = per_group(groups, n_in, n_out)
        send, between, receive = jax.random.split(key, 3)
        sizes = {"g": groups, "h": groups, "p": dim, "q": dim}
        drawn = normal(between, tuple(sizes[axis] for axis in self.pairs), 1)
        # Rows of length 1, for that is the size of a number that a group reads.
        summed = tuple(place for place, axis in enumerate(self.pairs) if axis in "hq")
        length = jnp.sqrt(jnp.sum(jnp.square(drawn), summed, keepdims=True))
        post = {"state": normal(receive, (groups, m, dim), dim), "map": drawn / length}
        return normal(send, (groups, n, dim), n), post

    def send(self, x: Array, pre: States) -> Array:
        return jnp.moveaxis(jnp.einsum("h...i,hip->h...p", split(x, pre.shape[0]), pre), 0, -2)

    def receive(self, signal: Array, post: States) -> Array:
        heard = jnp.einsum(f"...h{self.sent},{self.pairs}->...gp", signal, post["map"])
        return merge(read(jnp.moveaxis(heard, -2, 0), post["state"]))

    def weights(self, pre: States, post: States) -> Array:
        read = jnp.einsum(f"gjp,{self.pairs}->gjh{self.sent}", post["state"], post["map"])
        return square(jnp.einsum("gjhp,hip->gjhi", read, pre))


class MetricDiagonal(Metric):
    """`Metric` with diagonal M [G, G, r]: r (n_in + n_out + G^2) parameters, 2 FLOPs each."""

    pairs, sent = "ghp", "p"


class MetricScalar(Metric):
    """`Metric` with M [G, G]: r (n_in + n_out) + G^2 parameters, 2 r (n_in + n_out + G^2) FLOPs."""

    pairs, sent = "gh", "p"


class Within(SignalRule):
    """W[gj, gi] = sum_p R[g, j, p] S[g, i, p]: neurons of one group only, through p numbers each.

    pre S [G, n, p], post R [G, m, p]. p (n_in + n_out) parameters, 2 FLOPs a token each, rank G p.
    """

    inside = True
    spoken, heard = ("group", None), ("group", None)

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        n, m = per_group(groups, n_in, n_out)
        send, receive = jax.random.split(key)
        return normal(send, (groups, n, dim), n), normal(receive, (groups, m, dim), dim)

    def send(self, x: Array, pre: States) -> Array:
        return jnp.moveaxis(jnp.einsum("g...i,gip->g...p", split(x, pre.shape[0]), pre), 0, -2)

    def receive(self, signal: Array, post: States) -> Array:
        return merge(read(jnp.moveaxis(signal, -2, 0), post))

    def weights(self, pre: States, post: States) -> Array:
        return _block_diagonal(jnp.einsum("gjp,gip->gji", post, pre))


class Block(SignalRule):
    """W[gj, gi] = R[g, j, i]: a post state holds a number for each member of its group.

    The send state is one-hot and not stored: pre (), post R [G, m, n]. n_in n_out / G parameters, 2
    FLOPs a token each, full rank inside a group. With one group it is the dense layer.
    """

    inside = True
    spoken, heard = ("group",), ("group",)

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        n, m = per_group(groups, n_in, n_out)
        return (), normal(key, (groups, m, n), n)

    def send(self, x: Array, pre: States) -> Array:
        return x

    def receive(self, signal: Array, post: States) -> Array:
        return merge(read(split(signal, post.shape[0]), post))

    def weights(self, pre: States, post: States) -> Array:
        return _block_diagonal(post)


def split(x: Array, groups: int) -> Array:
    """[..., G n] -> [G, ..., n]: XLA:CPU multiplies a batch twice as fast with groups first."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)


def square(full: Array) -> Array:
    """Weights [G, m, G, n] as a matrix [G m, G n]."""
    return full.reshape(full.shape[0] * full.shape[1], -1)


def merge(y: Array) -> Array:
    """[G, ..., n] -> [..., G n]."""
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], -1)


def read(signal: Array, post: Array) -> Array:
    """What neurons hear of their group's signal [G, ..., p], post [G, m, p]: [G, ..., m]."""
    # XLA:CPU multiplies by a right factor with the summed axis first, and moves another one.
    if math.prod(signal.shape[1:-1]) < FEW:
        return jnp.moveaxis(jnp.einsum("gjp,g...p->gj...", post, signal), 1, -1)
    return jnp.einsum("g...p,gjp->g...j", signal, post)


def _block_diagonal(blocks: Array) -> Array:
    """[G, m, n] -> [G m, G n]."""
    if len(blocks) == 1:
        return blocks[0]
    same = jnp.eye(len(blocks), dtype=blocks.dtype)
    return square(blocks[:, :, None, :] * same[:, None, :, None])
