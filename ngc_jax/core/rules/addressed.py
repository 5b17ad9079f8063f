"""The addressed rule: neurons keep a port for each partner group; its wiring is fixed, or is data.

For: the states of a synapse under the wirings of `wiring.py` and `rewiring.py`. Not for: the other
signal rules, and what a rule must answer (`base.py`; `__init__.py` has the axes).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.core.rules.base import Sides, SignalRule, States, normal, per_group
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
        return _overheard(said, np.array(self.wiring), pre)

    def receive(self, signal: Array, post: States) -> Array:
        by_reader = jnp.moveaxis(signal, -2 if self.wiring is None else -3, 0)
        return merge(read(numbers(by_reader), numbers(post)))

    def to_speakers(self, pre: States, post: States) -> Sides:
        """These weights as states [..., G, n, G, p] and [..., G, m, G, p] of the complete rule.

        A speaker then holds its own states, zeros for channels that are not there, and can send on
        its own where groups are on different devices; `send` would move all of x.
        """
        if self.wiring is None:
            return pre, post
        slots = slots_of(jnp.array(self.wiring), len(self.wiring))
        return carry(pre, slots).swapaxes(-4, -2), carry(post, slots)

    def weights(self, pre: States, post: States) -> Array:
        if self.wiring is None:
            full = jnp.einsum("gjhp,higp->gjhi", post, pre)
        else:
            channels = jnp.einsum("gjsp,gisp->gsji", post, pre)
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
    are all 0 is empty: it is not heard and gets no gradient.
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
        return merge(read(numbers(jnp.moveaxis(signal, -3, 0)), numbers(post)))

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


def numbers(ports: Array) -> Array:
    """[..., k, p] -> [..., k p]: all numbers of all channels."""
    return ports.reshape(*ports.shape[:-2], -1)


def _overheard(said: Array, speakers: Array | np.ndarray, pre: Array) -> Array:
    """Signals [..., G, k, p] of x [G, ..., n] from speakers [G, k], by the listeners' states."""
    return jnp.einsum("gs...i,gisp->...gsp", said[speakers], pre)
