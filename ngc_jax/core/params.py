"""What a parameter is: the record that whoever creates one gives with it.

For: `ParamInfo`, which all others read. Not for: how records are collected (`nn/params.py`).
"""

import dataclasses
from typing import Any, Literal

import numpy as np

# Of neurons, with what they share; dense; at either end; a number a channel; who hears whom
Kind = Literal["state", "matrix", "embedding", "scale", "wiring"]


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """One parameter. A tree of these lies parallel to a tree of parameters."""

    kind: Kind
    axes: tuple[str | None, ...]  # what each counts: "stage", "group", "channel", "vocab", ...
    rule: str = ""  # of a synapse's states, its name
    part: str = ""  # the summand of the synapse, "intra", "inter" or "dense"
    side: str = ""  # whether they send, "pre", or receive, "post"
    # The axis, from the end, that a product with this sums over; those before it are a batch of
    # matrices, those after it outputs. None: it is no matrix.
    matrix: int | None = None

    @property
    def weighs(self) -> bool:
        """Whether it counts as a parameter "in matrices": states and dense matrices."""
        return self.kind in ("state", "matrix")


def state_info(states: Any, side: str, grouped: bool) -> Any:
    """The records of one side's states, as `Rule` describes them, or of their shapes."""
    known = (
        {"map": ("group",), "state": ("group", "neuron")} if grouped else {"state": ("channel",)}
    )

    def record(name: str, leaf: Any) -> ParamInfo:
        if not issubclass(leaf.dtype.type, np.floating):  # whatever it is called
            return ParamInfo("wiring", (None,) * leaf.ndim, side=side)
        first = known.get(name, ())
        axes = (*first, *(None,) * (leaf.ndim - len(first)))
        matrix = {"map": -2, "state": len(first) - 1 - leaf.ndim}.get(name)
        return ParamInfo("state", axes, side=side, matrix=matrix)

    if isinstance(states, dict):
        return {name: record(name, leaf) for name, leaf in states.items()}
    return () if isinstance(states, tuple) else record("state", states)
