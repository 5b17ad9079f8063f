"""Which synapses share their send states: presets, or a partition of one's own.

For: reading `config.model.sharing`. Not for: the shared states (`synapse.py` in a stage,
`stacks.py` across stages). Neurons whose synapses share `pre` states say the same to all of them.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

FANS = {  # the synapses of a stage, and the members of each that read the same input
    "query_key_value": ("query", "key", "value"),
    "attention_out": ("attention out",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
READERS = ("query_key_value", "gate_up")  # the synapses that read the stream
PRESETS = {"qkv": "query+key+value", "gate_up": "gate+up"}


class Sharing(NamedTuple):
    """Whose send states are whose. Numbers name sets in the order in which they first occur."""

    members: tuple[tuple[str, tuple[int, ...]], ...]  # of a synapse, the set of each in its fan
    stages: tuple[int, ...]  # the set of each stage that is stored: prelude, core, coda
    over_depth: tuple[str, ...]  # synapses in which these stages share; else each has its own

    def of(self, synapse: str) -> tuple[int, ...]:
        """The set of each member of a synapse's fan: (0, 0, 0) where query, key and value share."""
        return dict(self.members)[synapse]

    def in_depth(self, synapse: str) -> tuple[int, ...]:
        """The set of each stage, for a synapse."""
        return self.stages if synapse in self.over_depth else tuple(range(len(self.stages)))


def leaders(sets: tuple[int, ...]) -> np.ndarray:
    """The first member of each set: what `spread` undoes."""
    return np.array([sets.index(number) for number in range(max(sets) + 1)])


def spread(sets: tuple[int, ...], by_set: Any) -> Any:
    """What each set has, on the leading axis of a tree's arrays, for each of its members."""
    return by_set if sets == tuple(range(len(sets))) else take(by_set, np.array(sets))


def take(tree: Any, rows: Any) -> Any:
    """Rows of the leading axis of a tree's arrays."""
    return jax.tree.map(lambda a: a[rows], tree)


def parse(text: str, stages: int) -> Sharing:
    """Read "none", or a list with commas of presets and sets.

    Presets: "qkv", "gate_up", and "depth2", "depth3", ...: neighbours in depth, so many at a time.
    Sets: members of a stage, "query+key", or stages, "1+2+4". With "readers", stages share where
    they read the stream, as in Basis Sharing. Raises ValueError for another item.
    """
    numbers = tuple(map(str, range(1, stages + 1)))
    places = [*FANS.values(), numbers]
    leader = {name: name for place in places for name in place}
    items = [] if text == "none" else text.split(",")
    for item in (one for one in items if one != "readers"):
        names = tuple(PRESETS.get(item, item).split("+"))
        if run := re.fullmatch(r"depth([1-9]\d*)", item):
            runs = [numbers[first : first + int(run[1])] for first in range(0, stages, int(run[1]))]
        elif len(names) > 1 and any(set(names) <= set(place) for place in places):
            runs = [names]
        else:
            known = ", ".join([*PRESETS, "depth2", "depth3", "readers"])
            such = f"or '1+2', of {stages} stages" if stages > 1 else "of members of one synapse"
            wants = f"is no preset ({known}), nor a set such as 'query+key', {such}"
            raise ValueError(f"{item!r} {wants}")
        for joined in runs:
            merged, first = {leader[name] for name in joined}, leader[joined[0]]
            leader = {name: first if of in merged else of for name, of in leader.items()}

    def sets(place: tuple[str, ...]) -> tuple[int, ...]:
        order = list(dict.fromkeys(leader[name] for name in place))
        return tuple(order.index(leader[name]) for name in place)

    over_depth = READERS if "readers" in items else tuple(FANS)
    if over_depth == READERS and sets(numbers) == tuple(range(stages)):
        raise ValueError(
            "'readers' says where stages share, and none do: add 'depth2', for instance"
        )
    return Sharing(
        tuple((name, sets(fan)) for name, fan in FANS.items()), sets(numbers), over_depth
    )
