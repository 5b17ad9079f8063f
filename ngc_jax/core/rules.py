"""From states to weights: the rules by which the states of two neurons make the weight between them.

For: the rules, the two ways to use one (`transmit` a signal, or look at its `weights`), and their initial scale.
Not for: which synapses a model has (`nn/layers.py`), or how often they act (`communicate.py`).

Every neuron owns *states*: a `pre` state with which it sends, a `post` state with which it receives. A weight is an
interaction of two of them, W[j, i] = mu(post[j], pre[i]). Under the *signal rules* below W is a sum of products, so it
is never formed: senders emit a low-dimensional signal and receivers read it, and `y == x @ W.T` holds to rounding.

Axes: n_in, n_out neurons on either side; h, g the sending and the receiving group, G of each; i, j a neuron inside its
group, n = n_in / G and m = n_out / G of them; r numbers of a state; p numbers of one port.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
States = Any  # an array, or () where a state is one-hot and needs no storage

# A message activation is z -> z gate(z). In this form an activated synapse is y = W(x) x with a *transient* weight that
# the signal of the moment gates; read as a layer it is CoLA's activation between two factors (arXiv 2502.10940).
GATES: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.sigmoid,
    "gelu": jax.scipy.stats.norm.cdf,
    "relu": lambda z: (z > 0).astype(z.dtype),
}


class Rule:
    """What every rule answers. A rule is a namespace of pure functions and is never instantiated."""

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        """States (pre, post), float32, under which unit-variance x gives unit-variance y; `dim` is r or p."""
        raise NotImplementedError

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        """x [..., n_in] -> signal."""
        raise NotImplementedError

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        """Signal -> y [..., n_out]."""
        raise NotImplementedError

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None) -> Array:
        """W [n_out, n_in]; `gate`, of one token's signal shape, multiplies the signal where it passes."""
        raise NotImplementedError


class Broadcast(Rule):
    """W[j, i] = sum_r R[j, r] S[i, r]: every neuron hears the same r numbers. As a layer: low rank.

    pre S [n_in, r], post R [n_out, r]. r (n_in + n_out) parameters, twice that in FLOPs per token, rank r.
    """

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        send, receive = jax.random.split(key)
        return _normal(send, (n_in, dim), n_in), _normal(receive, (n_out, dim), dim)

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return x @ pre

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return signal @ post.T

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None) -> Array:
        return (post if gate is None else post * gate) @ pre.T


class Addressed(Rule):
    """W[gj, hi] = sum_p R[g, j, h, p] S[h, i, g, p]: a neuron keeps a port of p numbers for each partner group.

    pre S [G, n, G, p], post R [G, m, G, p]. p G (n_in + n_out) parameters, twice that in FLOPs per token, rank up to
    min(n_in, n_out, G^2 p). Alone, it is the block form known as Monarch (arXiv 2204.00595) and BTT (2406.06248).
    """

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        send, receive = jax.random.split(key)
        pre = _normal(send, (groups, n_in // groups, groups, dim), n_in // groups)
        return pre, _normal(receive, (groups, n_out // groups, groups, dim), groups * dim)

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return jnp.einsum("...hi,higp->...hgp", _split(x, pre.shape[0]), pre)

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return _merge(jnp.einsum("...hgp,gjhp->...gj", signal, post))

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None) -> Array:
        sent = pre if gate is None else pre * gate[:, None]
        full = jnp.einsum("gjhp,higp->gjhi", post, sent)
        return full.reshape(full.shape[0] * full.shape[1], -1)


class Within(Rule):
    """W[gj, gi] = sum_p R[g, j, p] S[g, i, p]: neurons of one group only, through p numbers each.

    pre S [G, n, p], post R [G, m, p]. p (n_in + n_out) parameters, twice that in FLOPs per token, rank G p.
    """

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        send, receive = jax.random.split(key)
        pre = _normal(send, (groups, n_in // groups, dim), n_in // groups)
        return pre, _normal(receive, (groups, n_out // groups, dim), dim)

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return jnp.einsum("...gi,gip->...gp", _split(x, pre.shape[0]), pre)

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return _merge(jnp.einsum("...gp,gjp->...gj", signal, post))

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None) -> Array:
        heard = post if gate is None else post * gate[:, None]
        return _block_diagonal(jnp.einsum("gjp,gip->gji", heard, pre))


class Block(Rule):
    """W[gj, gi] = R[g, j, i]: a post state holds one number for each member of its group (`Within` at p = n).

    The send state is then one-hot and not stored: pre is (), post R [G, m, n]. n_in n_out / G parameters, twice that
    in FLOPs per token, full rank inside a group. With one group it is the dense layer, our first baseline.
    """

    @staticmethod
    def init(key: Array, groups: int, n_in: int, n_out: int, dim: int) -> tuple[States, States]:
        return (), _normal(key, (groups, n_out // groups, n_in // groups), n_in // groups)

    @staticmethod
    def send(x: Array, pre: States) -> Array:
        return x

    @staticmethod
    def receive(signal: Array, post: States) -> Array:
        return _merge(jnp.einsum("...gi,gji->...gj", _split(signal, post.shape[0]), post))

    @staticmethod
    def weights(pre: States, post: States, gate: Array | None) -> Array:
        heard = post if gate is None else post * _split(gate, post.shape[0])[:, None]
        return _block_diagonal(heard)


RULES: dict[str, type[Rule]] = {"broadcast": Broadcast, "addressed": Addressed, "within": Within, "block": Block}


def transmit(rule: str, x: Array, pre: States, post: States, activation: str | None = None) -> Array:
    """What the receivers get: y [..., n_out] for x [..., n_in]. The weights are never formed.

    `activation` names an entry of `GATES`, applied to the signal. Raises KeyError for an unknown rule or activation.
    """
    signal = RULES[rule].send(x, pre)
    if activation is not None:
        signal = signal * GATES[activation](signal)
    return RULES[rule].receive(signal, post)


def weights(rule: str, pre: States, post: States, x: Array | None = None, activation: str | None = None) -> Array:
    """The weights that `transmit` acts with: W [n_out, n_in], `y == x @ W.T` to rounding.

    Without an activation W does not depend on x. With one, W(x) is the transient weight of a single token, and
    x [n_in] must be given: ValueError if it is not. Raises KeyError for an unknown rule or activation.
    """
    if activation is None:
        return RULES[rule].weights(pre, post, None)
    if x is None or x.ndim != 1:
        raise ValueError(f"activation={activation!r} makes the weights depend on the token: give x of shape [n_in]")
    return RULES[rule].weights(pre, post, GATES[activation](RULES[rule].send(x, pre)))


def activation_gain(activation: str | None) -> float:
    """1 / rms of z gate(z) for z ~ N(0, 1): the factor that restores unit variance after a message activation."""
    if activation is None:
        return 1.0
    points, mass = np.polynomial.hermite_e.hermegauss(101)
    with jax.ensure_compile_time_eval():
        gate = np.asarray(GATES[activation](jnp.asarray(points, jnp.float32)))
    return float(((points * gate) ** 2 @ mass / mass.sum()) ** -0.5)


def _normal(key: Array, shape: tuple[int, ...], fan_in: float) -> Array:
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


def _split(x: Array, groups: int) -> Array:
    """[..., G n] -> [..., G, n]."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)


def _merge(y: Array) -> Array:
    """[..., G, n] -> [..., G n]."""
    return y.reshape(*y.shape[:-2], -1)


def _block_diagonal(blocks: Array) -> Array:
    """[G, m, n] -> [G m, G n]."""
    groups, m, n = blocks.shape
    if groups == 1:
        return blocks[0]
    full = blocks[:, :, None, :] * jnp.eye(groups, dtype=blocks.dtype)[:, None, :, None]
    return full.reshape(groups * m, groups * n)
