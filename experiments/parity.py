"""Does iteration solve parity, where a feed-forward model of the same size does not?

Training has one to 39 bits and one question, at the end. The test has up to 1,000 bits. Recurrent
cells, NGC and dense, have about 10,000 parameters. Models with attention have 46,000: NGC with five
rounds, a dense loop, a dense stack, BDH. The same number of shorter runs searches each learning
rate. Attention covers the whole problem.

    python -m experiments.run parity
"""

import pathlib
from typing import Any

from experiments.setting import LARGER_TASK, SMALL_DENSE, learning
from experiments.study import Study
from experiments.sweeps import cases, seeds
from ngc_jax.training.evaluation import examine
from ngc_jax.training.load import load

BITS = (20, 39, 60, 100, 1000)
EXAMPLES = 200  # problems of each number of bits
STEPS = 600
COMMON: dict[str, Any] = {
    **learning(STEPS),
    "data.task": "parity",
    "data.low": 1,
    "data.high": 39,
    "data.context": 40,
    "model.prelude": 0,
    "model.core": 1,
    "model.p_inter": 2,
    "rate": (1.5e-3, 3e-3, 6e-3),
}
CELL: dict[str, Any] = {
    "model.kind": "recurrent",
    "model.rounds": 1,
    "model.width": 32,
    "model.hidden": 64,
}
LOOP: dict[str, Any] = {
    "model.prelude": 1,
    "model.rounds": 5,
    "model.p_inter": 3,
    "model.width": 64,
    "model.hidden": 128,
}
STACK: dict[str, Any] = {"model.prelude": 6, "model.core": 0, "model.width": 24, "model.hidden": 76}
MODELS: dict[str, dict[str, Any]] = {
    "recurrent NGC": CELL,
    "recurrent dense": {**CELL, "model.rule": "dense"},
    "NGC, 5 rounds": LOOP,
    "dense looped, 5 rounds": {**LOOP, **SMALL_DENSE},
    "dense": {**LOOP, **SMALL_DENSE, **STACK},
    "BDH": {"model.kind": "bdh", "model.rounds": 6, "model.width": 32, "model.hidden": 480},
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The fraction of problems solved, by the number of bits."""
    trained = load(workdir)
    return {
        f"exact, {n} bits": examine(trained.model, trained.params, trained.config, n, EXAMPLES)[
            "exact"
        ]
        for n in BITS
    }


STUDY = Study(
    sweep=cases("model", MODELS) * seeds(3),
    common=COMMON,
    larger=LARGER_TASK,
    measure=measure,
    outcome=f"exact, {BITS[-1]} bits",
    baseline={"model": "dense"},
    legend={"exact, 1000 bits": "fraction of problems of 1,000 bits solved; other bits likewise"},
)
