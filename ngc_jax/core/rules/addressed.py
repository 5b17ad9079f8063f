"""The addressed rule: neurons keep a port for each partner group; its wiring is fixed, or is data.

For: the states of a synapse under the wirings of `wiring.py` and `rewiring.py`. Not for: the other
signal rules, and what a rule must answer (`base.py`; the axes are those of `table.py`).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.rules.base import Axes, SignalRule, States, normal, per_group, product_norm
from ngc_jax.core.rules.signal import merge, read, split
from ngc_jax.core.wiring import Wiring, carry, slots_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Addressed(SignalRule):
    """W[gj, hi] = sum_p R[g, j, h, p] S[h, i, g, p]: a port of p numbers for each partner group.

    pre S [G, n, G, p], post R [G, m, G, p]. p G (n_in + n_out) parameters, twice that in FLOPs per
    token, rank up to min(n_in, n_out, G^2 p). Alone, it is the block form known as Monarch (arXiv
    2204.00595) and BTT (2406.06248).

    Under a wiring (`wiring.py`) group g hears k others, h = wiring[g][s], and W is 0 elsewhere. The
    states are then those of the channels alone, kept by their listener: S[g, i, s, p] belongs to
    neuron i of the group in slot s of g, pre [G, n, k, p], post R [G, m, k, p]. p k (n_in + n_out)
    parameters, twice that in FLOPs per token: a channel that is not there costs nothing.
    """

    spoken: ClassVar[Axes] = ("group", None, None)
    heard: ClassVar[Axes] = (None, "group", None)
    wiring: Wiring | None = None

    def init(
        self, key: Array, groups: int, n_in: int, n_out: int, dim: int
    ) -> tuple[States, States]:
        n, m = per_group(groups, n_in, n_out)
        if self.wiring and len(self.wiring) != groups:
            raise ValueError(f"groups={groups}: the wiring is one of {len(self.wiring)} groups")
        send, receive = jax.random.split(key)
        partners = len(self.wiring[0]) if self.wiring else groups
        pre = normal(send, (groups, n, partners, dim), n)
        return pre, normal(receive, (groups, m, partners, dim), partners * dim)

    def send(self, x: Array, pre: States) -> Array:
        said = split(x, pre.shape[0])
        if self.wiring is None:
            return jnp.moveaxis(jnp.einsum("h...i,higp->h...gp", said, pre), 0, -3)
        return _overheard(said, np.array(self.wiring), pre)

    def receive(self, signal: Array, post: States) -> Array:
        by_reader = jnp.moveaxis(signal, -2 if self.wiring is None else -3, 0)
        return merge(read(numbers(by_reader), numbers(post)))

    @property
    def by_speakers(self) -> SignalRule:
        return Addressed()

    def to_speakers(self, pre: States, post: States) -> tuple[States, States]:
        """States [..., G, n, G, p] and [..., G, m, G, p] of the complete rule, for these weights.

        A speaker then holds its own states, with zeros for the channels that are not there. So it
        can send on its own where groups are on different devices; `send` would move all of x.
        """
        if self.wiring is None:
            return pre, post
        heard = np.array(self.wiring)[:, None] == np.arange(len(self.wiring))[:, None]  # [G, G, k]
        slot = np.argmax(heard, -1)[:, None, :, None]
        there = np.any(heard, -1)[:, None, :, None]
        pre, post = (
            jnp.take_along_axis(s, slot, axis=-2) * there.astype(s.dtype) for s in (pre, post)
        )
        return pre.swapaxes(-4, -2), post

    def block_norms(self, pre: States, post: States) -> Array:
        # Of R[g, :, h, :] S[h, :, g, :]^T for each pair; under a wiring, of each channel.
        read, sent = (jnp.swapaxes(states, 1, 2) for states in (post, pre))
        if self.wiring is None:
            return product_norm(read, jnp.swapaxes(sent, 0, 1))
        empty = jnp.zeros((len(pre), len(pre)), pre.dtype)
        listeners = np.arange(len(pre))[:, None]
        return empty.at[listeners, np.array(self.wiring)].set(product_norm(read, sent))

    def weights(self, pre: States, post: States, gate: Array | None = None) -> Array:
        sent = pre if gate is None else pre * gate[:, None]
        if self.wiring is None:
            full = jnp.einsum("gjhp,higp->gjhi", post, sent)
        else:
            channels = jnp.einsum("gjsp,gisp->gsji", post, sent)
            groups, _, m, n = channels.shape
            full = jnp.zeros((groups, m, groups, n), channels.dtype)
            full = full.at[np.arange(groups)[:, None], :, np.array(self.wiring), :].set(channels)
        return full.reshape(full.shape[0] * full.shape[1], -1)


@dataclasses.dataclass(frozen=True)
class Rewirable(SignalRule):
    """`Addressed` under a wiring that is data: each synapse has its own, which may change.

    The edges that can lead to a group g are numbered e = 0 .. (G - 1) copies - 1, and e comes from
    the group g + 1 + e // copies (mod G), so never from g itself. With copies = 1 an edge is a
    whole channel of p numbers; with more, an edge is one port (dim is then 1). g keeps `slots` of
    them: pre {"state": S [G, n, slots, p], "hears": edges [G, slots], int32, distinct in each row},
    post R [G, m, slots, p]. Parameters and FLOPs are those of the slots. A slot whose two states
    are all 0 is empty: it is not heard, and gets no gradient, for that of a product of two is 0
    where both are.
    """

    slots: int
    copies: int = 1
    spoken: ClassVar[Axes] = ("group", None, None)
    heard: ClassVar[Axes] = ("group", None, None)

    def init(
        self, key: Array, groups: int, n_in: int, n_out: int, dim: int
    ) -> tuple[States, States]:
        n, m = per_group(groups, n_in, n_out)
        send, receive, wire = jax.random.split(key, 3)
        # Equally many for each listener, drawn by ordering all edges at random.
        order = jnp.argsort(jax.random.uniform(wire, (groups, (groups - 1) * self.copies)), axis=1)
        hears = jnp.sort(order[:, : self.slots], axis=1).astype(jnp.int32)
        pre = {"state": normal(send, (groups, n, self.slots, dim), n), "hears": hears}
        return pre, normal(receive, (groups, m, self.slots, dim), self.slots * dim)

    def send(self, x: Array, pre: States) -> Array:
        state = pre["state"]
        return _overheard(split(x, state.shape[0]), self._speakers(pre["hears"]), state)

    def receive(self, signal: Array, post: States) -> Array:
        return merge(read(numbers(jnp.moveaxis(signal, -3, 0)), numbers(post)))

    def weights(self, pre: States, post: States, gate: Array | None = None) -> Array:
        sent = pre["state"] if gate is None else pre["state"] * gate[:, None]
        return Addressed().weights(*self.to_speakers({**pre, "state": sent}, post))

    @property
    def by_speakers(self) -> SignalRule:
        return Addressed()

    def to_speakers(self, pre: States, post: States) -> tuple[Array, Array]:
        """The same weights as states of the complete `Addressed`, 0 where there is no edge."""
        groups = len(post)
        ports = self._speakers(pre["hears"]) * self.copies + pre["hears"] % self.copies
        slots = slots_of(ports, groups * self.copies)
        pre, post = (
            carry(states, slots).reshape(*states.shape[:2], groups, -1)
            for states in (pre["state"], post)
        )
        return jnp.einsum("gihp->higp", pre), post

    def block_norms(self, pre: States, post: States) -> Array:
        return Addressed().block_norms(*self.to_speakers(pre, post))

    def _speakers(self, hears: Array) -> Array:
        groups = hears.shape[0]
        return (jnp.arange(groups)[:, None] + 1 + hears // self.copies) % groups


def numbers(ports: Array) -> Array:
    """[..., k, p] -> [..., k p]: all numbers of all channels."""
    return ports.reshape(*ports.shape[:-2], -1)


def _overheard(said: Array, speakers: Array | np.ndarray, pre: Array) -> Array:
    """Signals [..., G, k, p] of x [G, ..., n] from speakers [G, k], by the listeners' states."""
    return jnp.einsum("gs...i,gisp->...gsp", said[speakers], pre)
