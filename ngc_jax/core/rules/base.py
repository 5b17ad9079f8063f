"""What a rule is: the two base classes, and the small functions that several rules share.

For: a rule of your own, a subclass put into `RULES` under a name. Not for: the rules themselves
(`signal.py`, `addressed.py`, `generated.py`), or using one (`__init__.py`, whose axes these are).
"""

import abc
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ngc_jax.core.params import state_info

Array = jax.Array
States = Any  # an array; a dict of them; or () where a state is one-hot and needs no storage
Sides = tuple[States, States]  # pre, post


class Rule(abc.ABC):
    """From states to weights, as pure functions; holds no arrays.

    A side's states are one array, numbers that each belong to one neuron; or a dict of these as
    "state", matrices between numbers as "map", and whatever else neurons share. post = 0 makes W 0.
    """

    grouped = True  # "state" begins with the axes (group, neuron); False: with all neurons
    inside = False  # True: the rule joins neurons of one group only
    amplitude: tuple[str, ...] = ()  # entries of post that scale W together; (): post is an array

    @abc.abstractmethod
    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
        """Float32 (pre, post), of `dim` numbers, that keep unit variance. Raises as `per_group`."""

    @abc.abstractmethod
    def weights(self, pre: States, post: States) -> Array:
        """W [n_out, n_in]."""

    def senders(self, pre: States) -> int:
        """The number of neurons that send by these states."""
        return math.prod(numbers_of(pre).shape[: 1 + self.grouped])

    def info(self, pre: States, post: States) -> tuple[Any, Any]:
        """Records (`ParamInfo`) of states, or of their shapes, as trees parallel to them."""
        return state_info(pre, "pre", self.grouped), state_info(post, "post", self.grouped)

    def block_norms(self, pre: States, post: States) -> Array:
        """Upper bounds of |W[g, h]| for each pair of groups [G, G], or of the whole |W| [1, 1]."""
        w, groups = self.weights(pre, post), len(numbers_of(post)) if self.grouped else 1
        return matrix_norm(w.reshape(groups, len(w) // groups, groups, -1).swapaxes(1, 2))

    def scaled(self, post: States, factor: Array | float) -> States:
        """The post states that make `factor` times the weights."""
        if not self.amplitude:
            return post * factor
        return {k: leaf * factor if k in self.amplitude else leaf for k, leaf in post.items()}

    def rescale(self, pre: States, post: States) -> States:
        """The post states that make, with these pre states, weights of mean square 1 / n_in."""
        w = self.weights(pre, post)
        return self.scaled(post, jax.lax.rsqrt(w.shape[1] * jnp.mean(jnp.square(w))))

    def alike(self, pre: States, post: States, kind: Array) -> Sides:
        """The states in which sender i of a group sends as kind[i] did (after arXiv 2310.08513)."""
        if isinstance(pre, tuple):  # post has a number for each sender
            return pre, self.rescale(pre, _in_kinds(post, kind, axis=2))
        state = numbers_of(pre)
        by_group = state.reshape(-1, len(kind), *state.shape[1 + self.grouped :])
        tied = _in_kinds(by_group, kind, axis=1).reshape(state.shape)
        pre = pre | {"state": tied} if isinstance(pre, dict) else tied
        return pre, self.rescale(pre, post)


class SignalRule(Rule):
    """A rule whose weights act without being formed: receive(send(x)) is x @ W.T.

    The last axis of a signal counts its numbers, as that of pre does where it may be late.
    """

    # For each axis of a signal behind those of x, "group" if it is of groups that send, else None.
    spoken: ClassVar[tuple[str | None, ...]]
    heard: ClassVar[tuple[str | None, ...]]  # the same of groups that read: here devices talk

    @abc.abstractmethod
    def send(self, x: Array, pre: States) -> Array:
        """x [..., n_in] -> signal."""

    @abc.abstractmethod
    def receive(self, signal: Array, post: States) -> Array:
        """Signal -> y [..., n_out]."""


def numbers_of(states: States) -> Array:
    """The numbers of one side that each belong to one neuron."""
    return states["state"] if isinstance(states, dict) else states


def per_group(groups: int, n_in: int, n_out: int) -> tuple[int, int]:
    """(n, m), neurons of a group on either side; ValueError where groups do not divide them."""
    if groups < 1 or n_in % groups or n_out % groups:
        works = (g for g in range(max(groups, 1), 0, -1) if math.gcd(n_in, n_out) % g == 0)
        wants = f"must divide n_in={n_in} and n_out={n_out}, for instance groups={next(works)}"
        raise ValueError(f"groups={groups}: {wants}")
    return n_in // groups, n_out // groups


def normal(key: Array, shape: tuple[int, ...], fan_in: float) -> Array:
    """Float32 numbers of mean 0 and variance 1 / fan_in."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def _in_kinds(states: Array, kind: Array, axis: int) -> Array:
    """States with those of neuron kind[i] in the place of neuron i's, at unchanged norms."""
    tied = jnp.take(states, kind, axis)
    before, after = (jnp.linalg.norm(s, axis=axis, keepdims=True) for s in (states, tied))
    return tied * (before / after)


def matrix_norm(matrix: Array) -> Array:
    """An upper bound of |W| for W [..., m, n], too large by a share n^(1/1024) - 1 at most, n <= m.

    (trace A^k)^(1/2k) with k = 512, by nine squarings of the Gram matrix A of the smaller side.
    (Many LAPACK eigenvalue calls in one program wait for each other for ever on XLA's CPU backend.)
    """
    small = matrix if matrix.shape[-2] <= matrix.shape[-1] else jnp.swapaxes(matrix, -1, -2)
    matrix = small @ jnp.swapaxes(small, -1, -2)
    logarithm, weight = jnp.zeros(matrix.shape[:-2]), 0.5
    for _ in range(10):  # the last square is not used: the compiler drops it
        trace = jnp.maximum(jnp.trace(matrix, axis1=-2, axis2=-1), 1e-30)
        logarithm, weight = logarithm + weight * jnp.log(trace), weight / 2
        matrix = matrix / trace[..., None, None]
        matrix = matrix @ matrix
    return jnp.exp(logarithm)
