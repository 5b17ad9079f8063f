"""Do puzzles gain from rounds of the loop, more than training had?

Sudokus of four digits and mazes: NGC against a dense loop of as many parameters and as long in training, both with two
to six rounds in training, drawn anew for each update, and four to 32 in the test. Levels 1 and 2 are difficulties of
training, level 3 is beyond it: 4, 8 and 11 empty cells; 3, 4 and 5 rooms a side. All cells must be right.

    python -m experiments.run puzzles
"""

import pathlib
from functools import partial
from typing import Any

from experiments.study import Study
from experiments.sweeps import cases, seeds
from ngc_jax.iteration import Apply
from ngc_jax.nn.model import LanguageModel
from ngc_jax.solve import examine
from ngc_jax.workdir import Trained, open_trained

LEVELS = {"sudoku4": (4, 8, 11), "maze": (3, 4, 5)}
ROUNDS = (4, 8, 16, 32)
EXAMPLES = 200  # of each level
STEPS = 1000
COMMON: dict[str, Any] = {
    "data.low": 2,
    "data.problems": 50_000,
    "model.prelude": 1,
    "model.core": 1,
    "model.coda": 0,
    "model.rounds": ROUNDS[0],
    "model.groups": 4,
    "model.heads": 4,
    "iteration.rounds": "uniform",
    "iteration.low": 2,
    "iteration.high": 6,
    "train.steps": STEPS,
    "train.batch_size": 64,
    "eval.every": STEPS,
    "checkpoint.every_steps": STEPS,
    "stability.every": 0,
    "rate": (2.5e-3, 5e-3, 1e-2),
}
PUZZLES: dict[str, dict[str, Any]] = {
    "sudoku": {"data.task": "sudoku4", "data.high": 8, "data.context": 33},
    "maze": {"data.task": "maze", "data.high": 4, "data.context": 99},
}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"model.width": 64, "model.hidden": 128},
    "dense looped": {"model.rule": "dense", "model.width": 48, "model.hidden": 96},
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The share of puzzles solved, by level and rounds."""
    trained = open_trained(workdir)

    def run(trained: Trained, rounds: int) -> tuple[LanguageModel, Apply | None]:
        return trained.looped.at(rounds), None

    return {
        f"level {level}, {rounds} rounds": examine(trained, difficulty, EXAMPLES, run=partial(run, rounds=rounds))[
            "exact"
        ]
        for level, difficulty in enumerate(LEVELS[trained.config.data.task], 1)
        for rounds in ROUNDS
    }


STUDY = Study(
    sweep=cases("puzzle", PUZZLES) * cases("model", MODELS) * seeds(3),
    common=COMMON,
    measure=measure,
    outcome=f"level 2, {ROUNDS[0]} rounds",
    baseline={"model": "dense looped"},
)
