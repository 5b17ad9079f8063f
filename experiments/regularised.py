"""Does a penalty for stability improve learning?

A loop of four rounds. A penalty in the loss holds the contraction or the exponent per round in a
band, or makes the Jacobian small.

    python -m experiments.run regularised
"""

import math
import pathlib
from typing import Any

from experiments.setting import COMMON, LARGER, STEPS
from experiments.study import Study
from experiments.sweeps import cases, seeds
from ngc_jax.runtime.metrics import latest, read_rows

TOLD: dict[str, dict[str, Any]] = {
    "nothing": {},
    "contraction below 0.5": {
        "stability.regulariser": "contraction",
        "stability.high": math.log(0.5),
    },
    "exponent below 0": {"stability.regulariser": "exponent", "stability.high": 0.0},
    "exponent below -0.5": {"stability.regulariser": "exponent", "stability.high": -0.5},
    "a small Jacobian": {"stability.jacobian": 1.0},
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The effect of the penalty: measures on held-out text after the last update."""
    last = latest(read_rows(workdir))
    return {
        f"{name} per round": last[f"stability/{name}_per_round"]
        for name in ("contraction", "exponent")
    }


STUDY = Study(
    sweep=cases("told", TOLD) * seeds(3),
    common={**COMMON, "model.rounds": 4, "stability.every": STEPS, "rate": 1e-2},
    larger=LARGER,
    measure=measure,
    baseline={"told": "nothing"},
    legend={
        "told": "what the penalty asks of the loop; nothing: no penalty",
        "contraction per round": "a factor; below 1 the steps of rounds shrink",
        "exponent per round": "leading exponent, in nats; below 0 neighbouring states approach",
    },
)
