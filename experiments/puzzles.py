"""Do puzzles gain from rounds of the loop, more than training had?

Sudokus of four digits and mazes, answered in place: NGC against a dense loop of as many parameters that is trained for
as long, both with two to six rounds in training, drawn anew for each update, and four to 32 in the test. Levels 1 and 2
are difficulties of training, level 3 is beyond it: 4, 8 and 11 empty cells; 3, 4 and 5 rooms a side. All cells must be
right.

    python -m experiments.run puzzles
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.overhead import overhead
from experiments.setting import LARGER_TASK, SMALL_DENSE, learning
from experiments.study import Study
from experiments.sweeps import Sweep, cases, seeds
from ngc_jax.solve import examine
from ngc_jax.workdir import open_trained

LEVELS = {"sudoku4_in_place": (4, 8, 11), "maze_in_place": (3, 4, 5)}
ROUNDS = (4, 8, 16, 32)
EXAMPLES = 200  # of each level
COMMON: dict[str, Any] = {
    "model.prelude": 1,
    "model.core": 1,
    "model.rounds": ROUNDS[0],
    "iteration.rounds": "uniform",
    "iteration.low": 2,
    "iteration.high": 6,
    "rate": (2.5e-3, 5e-3, 1e-2),
}
PUZZLES: dict[str, dict[str, Any]] = {
    "sudoku": {"data.task": "sudoku4_in_place", "data.low": 2, "data.high": 8, "data.context": 17},
    "maze": {"data.task": "maze_in_place", "data.low": 3, "data.high": 4, "data.context": 50},
}
# An update of NGC takes 1.25 times as long as the dense loop's on two idle cores: see `costs`.
UPDATES = {"sudoku": {"NGC": 2000, "dense looped": 2500}, "maze": {"NGC": 1500, "dense looped": 1875}}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"model.width": 64, "model.hidden": 128},
    "dense looped": SMALL_DENSE,
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The share of puzzles solved, by level and rounds."""
    trained = open_trained(workdir)

    def solved(difficulty: int, rounds: int) -> float:
        return examine(trained, difficulty, EXAMPLES, run=lambda same: (same.looped.at(rounds), None))["exact"]

    return {
        f"level {level}, {rounds} rounds": solved(difficulty, rounds)
        for level, difficulty in enumerate(LEVELS[trained.config.data.task], 1)
        for rounds in ROUNDS
    }


def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
    """How long training takes against the dense loop's."""
    dense = {config.data.task: config for config in configs if config.model.rule == "dense"}

    def column(config: ConfigDict, reference: ConfigDict) -> dict[str, str]:
        (one,) = overhead(reference, [config])
        return {"training time, dense = 1": f"{one.time * config.train.steps / reference.train.steps:.2f}"}

    return [column(config, dense[config.data.task]) for config in configs]


def sweep(puzzle: str) -> Sweep:
    """Both models, each for its number of updates."""
    models = {name: {**fields, **learning(UPDATES[puzzle][name])} for name, fields in MODELS.items()}
    return cases("puzzle", {puzzle: PUZZLES[puzzle]}) * cases("model", models) * seeds(3)


STUDY = Study(
    sweep=sweep("sudoku") + sweep("maze"),
    common=COMMON,
    larger=LARGER_TASK,
    measure=measure,
    costs=costs,
    tuning=1 / 4,
    outcome=f"level 2, {ROUNDS[0]} rounds",
    baseline={"model": "dense looped"},
)
