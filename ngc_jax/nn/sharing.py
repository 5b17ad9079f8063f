"""Which synapses share their send states: presets, or a partition of one's own.

For: reading `config.model.sharing`. Not for: holding the shared states (`layers.py` inside a stage,
`decoder.py` across stages), nor for the states with which a neuron receives, which are never
shared.

Neurons whose synapses share `pre` states say the same to all of them. Where these synapses read the
same input too (query, key and value; gate and up) the signal is computed once.
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

    # of each synapse, the set of each member of its fan
    members: tuple[tuple[str, tuple[int, ...]], ...]
    # the set of each stage that is stored: prelude, core, coda in this order
    stages: tuple[int, ...]
    # the synapses in which these stages share; in the others each has its own
    over_depth: tuple[str, ...]

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
    alone = sets == tuple(range(len(sets)))
    return by_set if alone else jax.tree.map(lambda a: a[np.array(sets)], by_set)


def parse(text: str, stages: int) -> Sharing:
    """Read "none", or a list with commas of presets and sets.

    Presets: "qkv", "gate_up", and "depth2", "depth3", ...: neighbours in depth, so many at a time.
    Sets: members of a stage, "query+key", or stages by number, "1+2+4". With "readers" among them,
    stages share where they read the stream (not in attention out and down), as in Basis Sharing.
    Raises ValueError, saying what is wrong and what would be right.
    """
    numbers = tuple(str(stage) for stage in range(1, stages + 1))
    places = [*FANS.values(), numbers]
    leader = {name: name for place in places for name in place}
    items = [] if text == "none" else text.split(",")
    for item in items:
        if item == "readers":
            continue
        run = re.fullmatch(r"depth([1-9]\d*)", item)
        length = int(run[1]) if run else 0
        runs = (
            [numbers[first : first + length] for first in range(0, stages, length)] if run else []
        )
        names = tuple(PRESETS.get(item, item).split("+"))
        if not run and (len(names) < 2 or not any(set(names) <= set(place) for place in places)):
            known = ", ".join([*PRESETS, "depth2", "depth3", "readers"])
            numbered = (
                f"or '1+2', of {stages} stages" if stages > 1 else "of members of one synapse"
            )
            raise ValueError(
                f"{item!r} is no preset ({known}), nor a set such as 'query+key', {numbered}"
            )
        for joined in runs or [names]:
            merged = {leader[name] for name in joined}
            leader = {
                name: leader[joined[0]] if of in merged else of for name, of in leader.items()
            }

    def sets(place: tuple[str, ...]) -> tuple[int, ...]:
        order = list(dict.fromkeys(leader[name] for name in place))
        return tuple(order.index(leader[name]) for name in place)

    if "readers" in items and sets(numbers) == tuple(range(stages)):
        raise ValueError(
            "'readers' says in which synapses stages share, and none do: add 'depth2', for instance"
        )
    over_depth = READERS if "readers" in items else tuple(FANS)
    return Sharing(
        tuple((name, sets(members)) for name, members in FANS.items()), sets(numbers), over_depth
    )
