"""What a parameter is: the record that whoever creates one gives with it.

For: `ParamInfo`, read by the optimizer, the mesh, counts, rewiring, bounds and instruments. Not
for: the parameters themselves, or how records are collected from layers (`nn/params.py`).
"""

import dataclasses
from typing import Any, Literal

import numpy as np

Kind = Literal["state", "matrix", "embedding", "scale", "wiring"]


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One parameter. A tree of these lies parallel to a tree of parameters.

    kind: "state" of neurons, a rule's own shared numbers among them; dense "matrix"; "embedding" at
    either end; "scale", one number a channel; or "wiring", integers that say who hears whom.
    axes: what each axis counts. `nn/mesh.py` knows "stage", "group", "channel" and "vocab"; other
    words, and None, mean that nothing depends on it.
    rule, part, side: of a synapse's states, the rule's name, the summand ("intra", "inter",
    "dense"), and whether they send ("pre") or receive ("post").
    matrix: the axis, counted from the end, that a product with this parameter sums over. The axes
    after it are the outputs, those before it a batch of matrices. None: it is no matrix.
    """

    kind: Kind
    axes: tuple[str | None, ...]
    rule: str = ""
    part: str = ""
    side: str = ""
    matrix: int | None = None

    @property
    def weighs(self) -> bool:
        """Whether it counts as a parameter "in matrices": states and dense matrices."""
        return self.kind in ("state", "matrix")

    def stacked(self, counts: str) -> "ParamInfo":
        """The record of such parameters behind one another on a new leading axis."""
        return dataclasses.replace(self, axes=(counts, *self.axes))


def state_info(states: Any, side: str, grouped: bool) -> Any:
    """The records of one side's states: an array, a dict as `Rule` describes it, or ().

    `states` may be shapes. Integers are a wiring, whatever they are called.
    """

    def record(name: str, leaf: Any) -> ParamInfo:
        ndim, integers = leaf.ndim, not issubclass(leaf.dtype.type, np.floating)
        if integers:
            return ParamInfo("wiring", (None,) * ndim, side=side)
        first = ("group", "neuron") if grouped else ("channel",)
        if name == "map":
            axes = (("group",) if grouped else ()) + (None,) * (ndim - grouped)
            return ParamInfo("state", axes, side=side, matrix=-2)
        if name != "state":
            return ParamInfo("state", (None,) * ndim, side=side)
        axes = (*first, *(None,) * (ndim - len(first)))
        return ParamInfo("state", axes, side=side, matrix=len(first) - 1 - ndim)

    if isinstance(states, tuple):
        return ()
    if isinstance(states, dict):
        return {name: record(name, leaf) for name, leaf in states.items()}
    return record("state", states)
