"""What a rule is: the two base classes, and the small functions that several rules share.

For: a rule of your own, a subclass of `Rule` or `SignalRule` put into `RULES` under a name. Not
for: the rules themselves (`signal.py`, `addressed.py`, `generated.py`), or using one by its name
(`table.py`, whose axes these are).
"""

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ngc_jax.core.params import state_info

Array = jax.Array
Axes = tuple[str | None, ...]  # what the axes of a signal behind those of x count: "group" or None
States = Any  # an array; a dict of them; or () where a state is one-hot and needs no storage


class Rule(abc.ABC):
    """From states to weights, as pure functions. A rule holds no arrays.

    A side's states are one array, numbers that each belong to one neuron. A rule with more has a
    dict: the neurons' numbers as "state", matrices between numbers as "map", and whatever else the
    neurons share. W is 0 where all of post is 0.
    """

    grouped = True  # "state" begins with the axes (group, neuron); False: with all neurons
    inside = False  # True: the rule joins neurons of one group only
    amplitude: tuple[str, ...] = ()  # entries of post that scale W together; (): post is an array

    @abc.abstractmethod
    def init(
        self, key: Array, groups: int, n_in: int, n_out: int, dim: int
    ) -> tuple[States, States]:
        """States (pre, post), float32, under which unit-variance x gives unit-variance y.

        `dim` is the numbers of a state (r) or of a port (p). Raises ValueError, as `per_group`
        does, where the rule has groups and they do not divide the neurons.
        """

    @abc.abstractmethod
    def weights(self, pre: States, post: States) -> Array:
        """W [n_out, n_in]."""

    def inputs(self, pre: States, post: States = ()) -> int | None:
        """n_in, which x must have, by the states; None where they do not say."""
        if isinstance(pre, tuple):
            return None
        return math.prod(numbers_of(pre).shape[: 1 + self.grouped])

    def info(self, pre: States, post: States) -> tuple[Any, Any]:
        """Records (`ParamInfo`) of states, or of their shapes, as trees parallel to them."""
        return state_info(pre, "pre", self.grouped), state_info(post, "post", self.grouped)

    def block_norms(self, pre: States, post: States) -> Array:
        """Upper bounds of |W[g, h]| for each pair of groups [G, G], or of the whole |W| [1, 1]."""
        return matrix_norm(self.weights(pre, post))[None, None]

    def scaled(self, post: States, factor: Array | float) -> States:
        """The post states that make `factor` times the weights."""
        if not self.amplitude:
            return post * factor
        return {k: leaf * factor if k in self.amplitude else leaf for k, leaf in post.items()}

    def rescale(self, pre: States, post: States) -> States:
        """The post states that make, with these pre states, weights of mean square 1 / n_in."""
        w = self.weights(pre, post)
        return self.scaled(post, jax.lax.rsqrt(w.shape[1] * jnp.mean(jnp.square(w))))

    def alike(self, pre: States, post: States, kind: Array) -> tuple[States, States]:
        """The states with a group's senders in kinds that send alike: i sends as kind[i] did.

        kind [n], integers. A kind's columns of W are equal, so W has at most that rank for each
        group; then W is rescaled. Source: ours, for the question of arXiv 2310.08513, what the rank
        of initial weights does to learning.
        """
        state = numbers_of(pre)
        by_group = state.reshape(-1, len(kind), *state.shape[1 + self.grouped :])
        tied = in_kinds(by_group, kind, axis=1).reshape(state.shape)
        pre = pre | {"state": tied} if isinstance(pre, dict) else tied
        return pre, self.rescale(pre, post)


class SignalRule(Rule):
    """A rule whose weights act without being formed: receive(send(x)) is x @ W.T.

    `spoken` and `heard` say which axis of a signal belongs to the group that sends, and which to
    the group that reads. Where groups are on different devices, a signal crosses between the two.
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
        """W [n_out, n_in]; `gate` has one token's signal shape and multiplies the signal."""

    @property
    def by_speakers(self) -> "SignalRule":
        """The rule of the same weights whose senders hold their own states; see `to_speakers`."""
        return self

    def to_speakers(self, pre: States, post: States) -> tuple[States, States]:
        """States of `by_speakers` that make the weights of these."""
        return pre, post


def numbers_of(states: States) -> Array:
    """The numbers of one side that each belong to one neuron."""
    return states["state"] if isinstance(states, dict) else states


def per_group(groups: int, n_in: int, n_out: int) -> tuple[int, int]:
    """(n, m), the neurons of one group on either side.

    Raises ValueError where groups do not divide n_in and n_out.
    """
    if groups < 1 or n_in % groups or n_out % groups:
        works = (g for g in range(max(groups, 1), 0, -1) if math.gcd(n_in, n_out) % g == 0)
        raise ValueError(
            f"groups={groups}: must divide n_in={n_in} and n_out={n_out}, "
            f"for instance groups={next(works)}"
        )
    return n_in // groups, n_out // groups


def normal(key: Array, shape: tuple[int, ...], fan_in: float) -> Array:
    """Float32 numbers of mean 0 and variance 1 / fan_in."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def in_kinds(states: Array, kind: Array, axis: int) -> Array:
    """States in which neuron i along `axis` has those of neuron kind[i], at unchanged norms."""
    tied = jnp.take(states, kind, axis)
    before, after = (jnp.linalg.norm(s, axis=axis, keepdims=True) for s in (states, tied))
    return tied * (before / after)


def product_norm(left: Array, right: Array) -> Array:
    """|R S^T| for R [..., m, p], S [..., n, p]: from the top eigenvalue of two Gram matrices."""
    a, b = (jnp.swapaxes(m, -1, -2) @ m for m in (left, right))
    return jnp.sqrt(top_eigenvalue(a @ b))


def matrix_norm(matrix: Array) -> Array:
    """|W| for W [..., m, n], from the Gram matrix of its smaller side."""
    small = matrix if matrix.shape[-2] <= matrix.shape[-1] else jnp.swapaxes(matrix, -1, -2)
    return jnp.sqrt(top_eigenvalue(small @ jnp.swapaxes(small, -1, -2)))


def top_eigenvalue(matrix: Array) -> Array:
    """An upper bound of the top eigenvalue of [..., n, n] without negative eigenvalues.

    (trace A^m)^(1/m) with m = 512, by nine squarings; too large by a share n^(1/512) - 1 at most.
    (Many LAPACK eigenvalue calls in one program wait for each other for ever on XLA's CPU backend.)
    """
    logarithm, weight = jnp.zeros(matrix.shape[:-2]), 1.0
    for _ in range(9):
        trace = jnp.maximum(jnp.trace(matrix, axis1=-2, axis2=-1), 1e-30)
        logarithm, weight = logarithm + weight * jnp.log(trace), weight / 2
        matrix = matrix / trace[..., None, None]
        matrix = matrix @ matrix
    trace = jnp.maximum(jnp.trace(matrix, axis1=-2, axis2=-1), 1e-30)
    return jnp.exp(logarithm + weight * jnp.log(trace))
