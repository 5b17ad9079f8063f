"""The signal rules: a weight is a sum of products, so neurons send a few numbers and groups read
them.

For: what every rule answers (`Rule`, `SignalRule`), and the rules under which no weight need ever
be formed: `broadcast`, `metric` and its two small forms, `within`, `block`. Not for: `addressed`
with its wirings (`addressed.py`), rules that make W whole (`generated_rules.py`), or using a rule
by its name (`rules.py`, whose axes these are).
"""

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

Array = jax.Array
# of a signal, behind those of x: "group", or None for what is no group's own
Axes = tuple[str | None, ...]
States = Any  # an array; a dict of them; or () where a state is one-hot and needs no storage
# tokens, below which a product's time is that of reading states, so that these are best read as
# they lie
FEW = 8


class Rule(abc.ABC):
    """What every rule answers: pure functions. A rule holds no arrays.

    A side's states are one array, numbers that each belong to one neuron; or, where a rule has
    more, a dict with them as "state", matrices between numbers as "map", and whatever else the
    neurons share. W is 0 where all of post is.
    """

    # whether the first axis of "state" is the group and the second the neuron, or the first the
    # neuron
    grouped = True
    # the entries of post that W is proportional to, together; (): post, an array
    amplitude: tuple[str, ...] = ()

    @abc.abstractmethod
    def init(
        self, key: Array, groups: int, n_in: int, n_out: int, dim: int
    ) -> tuple[States, States]:
        """States (pre, post), float32, under which unit-variance x gives unit-variance y; `dim` is
        r or p.
        """

    def scaled(self, post: States, factor: Array | float) -> States:
        """The post states that make `factor` times the weights."""
        if not self.amplitude:
            return post * factor
        return {
            name: leaf * factor if name in self.amplitude else leaf for name, leaf in post.items()
        }

    def rescale(self, pre: States, post: States) -> States:
        """The post states that make, with these pre states, weights of mean square 1 / n_in."""
        w = self.weights(pre, post)
        return self.scaled(post, jax.lax.rsqrt(w.shape[1] * jnp.mean(jnp.square(w))))

    def alike(self, pre: States, post: States, kind: Array) -> tuple[States, States]:
        """The states with the senders of a group in kinds that send alike: i as kind[i] did, for
        kind [n] of integers.

        A kind's columns of W are equal, so W has a rank of at most the number of kinds for each
        group. W is rescale again. Source: ours, for the question of arXiv 2310.08513, what the rank
        of initial weights does to learning.
        """
        state = pre["state"] if isinstance(pre, dict) else pre
        by_group = state.reshape(-1, len(kind), *state.shape[1 + self.grouped :])
        tied = in_kinds(by_group, kind, axis=1).reshape(state.shape)
        pre = pre | {"state": tied} if isinstance(pre, dict) else tied
        return pre, self.rescale(pre, post)

    @abc.abstractmethod
    def weights(self, pre: States, post: States) -> Array:
        """W [n_out, n_in]."""


class SignalRule(Rule):
    """A rule whose weights act without being formed: receive(send(x)) is x @ W.T.

    `spoken` and `heard` say which axis of a signal belongs to the group that sends, and which to
    the group that reads: where groups are on different devices (`mesh.py`), a signal crosses from
    the one to the other.
    """

    spoken: ClassVar[Axes]
    heard: ClassVar[Axes]

    @abc.abstractmethod
    def send(self, x: Array, pre: States) -> Array:
        """x [..., n_in] -> signal."""

    @abc.abstractmethod
    def receive(self, signal: Array, post: States) -> Array:
        """Signal -> y [..., n_out]."""

    @abc.abstractmethod
    def weights(self, pre: States, post: States, gate: Array | None = None) -> Array:
        """W [n_out, n_in]; `gate`, of one token's signal shape, multiplies the signal where it
        passes.
        """


class Broadcast(SignalRule):
    """W[j, i] = sum_r R[j, r] S[i, r]: every neuron hears the same r numbers. As a layer: low rank.

    pre S [n_in, r], post R [n_out, r]. r (n_in + n_out) parameters, twice that in FLOPs per token,
    rank r.
    """

    grouped = False
    spoken: ClassVar[Axes] = (None,)
    heard: ClassVar[Axes] = (None,)

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        send, receive = jax.random.split(key)
        return normal(send, (n_in, dim), n_in), normal(receive, (n_out, dim), dim)

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return x @ pre

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return signal @ post.T

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None = None) -> Array:
        return (post if gate is None else post * gate) @ pre.T


class Metric(SignalRule):
    """W[gj, hi] = R[g, j] . M[g, h] S[h, i]: states are compared by a map of each pair of groups'
    own.

    pre S [G, n, r], post {"state": R [G, m, r], "map": M [G, G, r, r]}. r (n_in + n_out) + G^2 r^2
    parameters, twice that in FLOPs per token, rank up to min(n_in, n_out, G r). Source: ours. M is
    shared by a group's neurons: where a port of `addressed` costs every neuron a state for each
    partner, here the pair of groups pays.
    """

    amplitude = ("state",)
    spoken: ClassVar[Axes] = ("group", None)
    heard: ClassVar[Axes] = (None, None)
    pairs = "ghpq"  # the axes of M: listening group, speaking group, number read, number sent

    @classmethod
    def init(
        cls, key: Array, groups: int, n_in: int, n_out: int, dim: int
    ) -> tuple[States, States]:
        send, between, receive = jax.random.split(key, 3)
        sizes = {"g": groups, "h": groups, "p": dim, "q": dim}
        drawn = normal(between, tuple(sizes[axis] for axis in cls.pairs), 1)
        # Rows of length 1: a map has few numbers, and a row's length is the size of a number that a
        # group reads.
        summed = tuple(place for place, axis in enumerate(cls.pairs) if axis in "hq")
        length = jnp.sqrt(jnp.sum(jnp.square(drawn), summed, keepdims=True))
        post = {
            "state": normal(receive, (groups, n_out // groups, dim), dim),
            "map": drawn / length,
        }
        return normal(send, (groups, n_in // groups, dim), n_in // groups), post

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return jnp.moveaxis(jnp.einsum("h...i,hip->h...p", split(x, pre.shape[0]), pre), 0, -2)

    @classmethod
    def receive(cls, signal: Array, post: States) -> Array:
        # a diagonal or scalar map leaves numbers where they are
        sent = "q" if "q" in cls.pairs else "p"
        heard = jnp.einsum(f"...h{sent},{cls.pairs}->...gp", signal, post["map"])
        return merge(read(jnp.moveaxis(heard, -2, 0), post["state"]))

    @classmethod
    def weights(cls, pre: States, post: States, gate: Array | None = None) -> Array:
        sent = "q" if "q" in cls.pairs else "p"
        read = jnp.einsum(f"gjp,{cls.pairs}->gjh{sent}", post["state"], post["map"])
        full = jnp.einsum("gjhp,hip->gjhi", read, pre if gate is None else pre * gate[:, None])
        return full.reshape(full.shape[0] * full.shape[1], -1)


class MetricDiagonal(Metric):
    """W[gj, hi] = sum_r R[g, j, r] M[g, h, r] S[h, i, r]: `Metric` with a factor for each number of
    a pair.

    post {"state": R [G, m, r], "map": M [G, G, r]}. r (n_in + n_out) + G^2 r parameters, twice that
    in FLOPs per token, rank up to min(n_in, n_out, G r). Source: ours.
    """

    pairs = "ghp"


class MetricScalar(Metric):
    """W[gj, hi] = M[g, h] R[g, j] . S[h, i]: `Metric` with one factor for each pair, a graph of
    groups.

    post {"state": R [G, m, r], "map": M [G, G]}. r (n_in + n_out) + G^2 parameters; 2 r (n_in +
    n_out) + 2 r G^2 FLOPs per token; rank up to min(n_in, n_out, G r). Source: ours.
    """

    pairs = "gh"


class Within(SignalRule):
    """W[gj, gi] = sum_p R[g, j, p] S[g, i, p]: neurons of one group only, through p numbers each.

    pre S [G, n, p], post R [G, m, p]. p (n_in + n_out) parameters, twice that in FLOPs per token,
    rank G p.
    """

    spoken: ClassVar[Axes] = ("group", None)
    heard: ClassVar[Axes] = ("group", None)

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        send, receive = jax.random.split(key)
        pre = normal(send, (groups, n_in // groups, dim), n_in // groups)
        return pre, normal(receive, (groups, n_out // groups, dim), dim)

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return jnp.moveaxis(jnp.einsum("g...i,gip->g...p", split(x, pre.shape[0]), pre), 0, -2)

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return merge(read(jnp.moveaxis(signal, -2, 0), post))

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None = None) -> Array:
        heard = post if gate is None else post * gate[:, None]
        return _block_diagonal(jnp.einsum("gjp,gip->gji", heard, pre))


class Block(SignalRule):
    """W[gj, gi] = R[g, j, i]: a post state holds one number for each member of its group (`Within`
    at p = n).

    The send state is then one-hot and not stored: pre is (), post R [G, m, n]. n_in n_out / G
    parameters, twice that in FLOPs per token, full rank inside a group. With one group it is the
    dense layer, our first baseline.
    """

    spoken: ClassVar[Axes] = ("group",)
    heard: ClassVar[Axes] = ("group",)

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        return (), normal(key, (groups, n_out // groups, n_in // groups), n_in // groups)

    def alike(self, pre: States, post: States, kind: Array) -> tuple[States, States]:
        return pre, self.rescale(pre, in_kinds(post, kind, axis=2))

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return x

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return merge(read(split(signal, post.shape[0]), post))

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None = None) -> Array:
        heard = post if gate is None else post * split(gate, post.shape[0])[:, None]
        return _block_diagonal(heard)


def normal(key: Array, shape: tuple[int, ...], fan_in: float) -> Array:
    """Float32 numbers of mean 0 and variance 1 / fan_in."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def in_kinds(states: Array, kind: Array, axis: int) -> Array:
    """States in which neuron i along `axis` has those of neuron kind[i], each number of a state as
    loud as it was.
    """
    tied = jnp.take(states, kind, axis)
    before, after = (jnp.linalg.norm(s, axis=axis, keepdims=True) for s in (states, tied))
    return tied * (before / after)


def split(x: Array, groups: int) -> Array:
    """[..., G n] -> [G, ..., n]: groups in front, where XLA:CPU multiplies a batch of matrices
    twice as fast.
    """
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)


def merge(y: Array) -> Array:
    """[G, ..., n] -> [..., G n]."""
    return jnp.moveaxis(y, 0, -2).reshape(*y.shape[1:-1], -1)


def read(signal: Array, post: Array) -> Array:
    """What a group's neurons hear of its signal: [G, ..., p] and post states [G, m, p] -> [G, ...,
    m].

    XLA:CPU multiplies by a right factor with the summed axis first, and moves one that lies
    otherwise.
    """
    if math.prod(signal.shape[1:-1]) < FEW:
        return jnp.moveaxis(jnp.einsum("gjp,g...p->gj...", post, signal), 1, -1)
    return jnp.einsum("g...p,gjp->g...j", signal, post)


def _block_diagonal(blocks: Array) -> Array:
    """[G, m, n] -> [G m, G n]."""
    groups, m, n = blocks.shape
    if groups == 1:
        return blocks[0]
    full = blocks[:, :, None, :] * jnp.eye(groups, dtype=blocks.dtype)[:, None, :, None]
    return full.reshape(groups * m, groups * n)
