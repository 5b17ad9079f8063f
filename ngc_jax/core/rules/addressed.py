"""The addressed rule: neurons keep a port for each partner group; its wiring is fixed, or is data.

For: states under the wirings of `wiring.py` and `rewiring.py`. Not for: the other signal rules
(`signal.py`). `__init__.py` has the axes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.rules.base import Sides, SignalRule, States, normal, per_group
from ngc_jax.core.rules.signal import FEW, merge, read, split, square
from ngc_jax.core.wiring import Wiring, carry, slots_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Addressed(SignalRule):
    """W[gj, hi] = sum_p R[g, j, h, p] S[h, i, g, p]: a port of p numbers for each partner group.

    pre S [G, n, G, p], post R [G, m, G, p]. p G (n_in + n_out) parameters, twice that in FLOPs per
    token, rank up to min(n_in, n_out, G^2 p). Alone, it is the block form known as Monarch (arXiv
    2204.00595) and BTT (2406.06248). Under a wiring group g hears k others, h = wiring[g][s], and W
    is 0 elsewhere. States are then those of k channels for G, kept by their listener: pre S [G, n,
    k, p], of which S[g, i, s, p] belongs to neuron i of the group in slot s of g; R [G, m, k, p].
    """

    spoken, heard = ("group", None, None), (None, "group", None)
    wiring: Wiring | None = None

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
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
        if math.prod(said.shape[1:-1]) < FEW or not self.even:
            return _overheard(said, np.array(self.wiring), pre)
        return _spoken(said, np.array(self.wiring), pre)

    def receive(self, signal: Array, post: States) -> Array:
        return _heard(jnp.moveaxis(signal, -2 if self.wiring is None else -3, 0), post)

    def to_speakers(self, pre: States, post: States) -> Sides:
        """The weights as states of the complete rule: speakers on other devices can then send."""
        if self.wiring is None:
            return pre, post
        slots = slots_of(jnp.array(self.wiring), len(self.wiring))
        return carry(pre, slots).swapaxes(-4, -2), carry(post, slots)

    @functools.cached_property
    def even(self) -> bool:
        """Whether each group is heard by as many as it hears, so that speakers can be a batch."""
        wiring = np.array(self.wiring)
        return bool(np.all(np.bincount(wiring.ravel(), minlength=len(wiring)) == wiring.shape[1]))

    def weights(self, pre: States, post: States) -> Array:
        if self.wiring is None:
            return square(jnp.einsum("gjhp,higp->gjhi", post, pre))
        channels = jnp.einsum("gjsp,gisp->gsji", post, pre)
        groups, _, m, n = channels.shape
        full = jnp.zeros((groups, m, groups, n), channels.dtype)
        return square(full.at[np.arange(groups)[:, None], :, np.array(self.wiring)].set(channels))


@dataclasses.dataclass(frozen=True)
class Rewirable(SignalRule):
    """`Addressed` under a wiring that is data: each synapse has its own, which may change.

    Edge e = 0 .. (G - 1) copies - 1 of a group g comes from group g + 1 + e // copies (mod G). With
    copies = 1 an edge is a channel of p numbers; with more, one port (dim is then 1). g keeps some:
    pre {"state": S [G, n, slots, p], "hears": edges [G, slots], int32, distinct in each row}, post
    R [G, m, slots, p]. A slot whose two states are all 0 is empty: it gets no gradient.
    """

    slots: int
    copies: int = 1
    spoken, heard = ("group", None, None), ("group", None, None)

    def init(self, key: Array, groups: int, n_in: int, n_out: int, dim: int) -> Sides:
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
        return _heard(jnp.moveaxis(signal, -3, 0), post)

    def weights(self, pre: States, post: States) -> Array:
        return Addressed().weights(*self.to_speakers(pre, post))

    def to_speakers(self, pre: States, post: States) -> Sides:
        """The same weights as states of the complete `Addressed`, 0 where there is no edge."""
        groups = len(post)
        ports = self._speakers(pre["hears"]) * self.copies + pre["hears"] % self.copies
        slots = slots_of(ports, groups * self.copies)
        both = (pre["state"], post)
        pre, post = (carry(s, slots).reshape(*s.shape[:2], groups, -1) for s in both)
        return jnp.einsum("gihp->higp", pre), post

    def _speakers(self, hears: Array) -> Array:
        return (jnp.arange(len(hears))[:, None] + 1 + hears // self.copies) % len(hears)


def _heard(by_reader: Array, post: Array) -> Array:
    """`read` of signals [G, ..., k, p], all numbers of all channels at once."""
    return merge(read(*(ports.reshape(*ports.shape[:-2], -1) for ports in (by_reader, post))))


def _overheard(said: Array, speakers: Array | np.ndarray, pre: Array) -> Array:
    """Signals [..., G, k, p] of x [G, ..., n] from speakers [G, k], by the listeners' states."""
    return jnp.einsum("gs...i,gisp->...gsp", said[speakers], pre)


def _spoken(said: Array, speakers: np.ndarray, pre: Array) -> Array:
    """As `_overheard`, by speakers that each have k listeners: x is not copied for each of them."""
    groups, k = speakers.shape
    slots = np.argsort(speakers, axis=None, kind="stable")  # (g, s), by speaker and listener
    by_slot = jnp.moveaxis(pre, 2, 1).reshape(groups * k, *pre.shape[1::2])
    by_speaker = by_slot[slots].reshape(groups, k, *by_slot.shape[1:])
    signal = jnp.einsum("h...i,hjip->hj...p", said, by_speaker)
    signal = signal.reshape(groups * k, *signal.shape[2:])[np.argsort(slots)]
    return jnp.moveaxis(signal.reshape(groups, k, *signal.shape[1:]), (0, 1), (-3, -2))
