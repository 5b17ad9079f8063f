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

    kind: "state" of neurons, with what they share; dense "matrix"; "embedding" at either end;
    "scale", one number a channel; or "wiring", integers that say who hears whom.
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


def state_info(states: Any, side: str, grouped: bool) -> Any:
    """The records of one side's states, as `Rule` describes them, or of their shapes."""

    def record(name: str, leaf: Any) -> ParamInfo:
        first, matrix = list[str](), None
        if not issubclass(leaf.dtype.type, np.floating):  # whatever it is called
            return ParamInfo("wiring", (None,) * leaf.ndim, side=side)
        if name == "map":
            first, matrix = ["group"] * grouped, -2
        elif name == "state":
            first = ["group", "neuron"] if grouped else ["channel"]
            matrix = len(first) - 1 - leaf.ndim
        axes = (*first, *(None,) * (leaf.ndim - len(first)))
        return ParamInfo("state", axes, side=side, matrix=matrix)

    if isinstance(states, dict):
        return {name: record(name, leaf) for name, leaf in states.items()}
    return () if isinstance(states, tuple) else record("state", states)
