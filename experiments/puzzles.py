"""Can puzzles use more rounds of the loop than training had?

Sudokus of four digits and mazes, answered in place. NGC is compared with a dense loop that has as
many parameters and trains for as long. Training draws two to six rounds for each update; the test
uses 4 to 32. Levels 1 and 2 are difficulties of training, level 3 is harder: 4, 8 and 11 empty
cells; 3, 4 and 5 rooms per side. A puzzle is solved if all its cells are right.

    python -m experiments.run puzzles
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.figures import looks
from experiments.overhead import overhead
from experiments.setting import LARGER_TASK, SMALL_DENSE, learning
from experiments.stats import interval
from experiments.study import Group, Results, Study
from experiments.sweeps import Sweep, cases, seeds
from ngc_jax.report.blocks import Block, heading, paragraph, table
from ngc_jax.report.figures import figure
from ngc_jax.training.evaluation import examine
from ngc_jax.training.load import load

LEVELS = {"sudoku4_in_place": (4, 8, 11), "maze_in_place": (3, 4, 5)}
ROUNDS = (4, 8, 16, 32)
EXAMPLES = 200  # puzzles of each level
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
# On two idle cores, an update of NGC takes 1.25 times as long as one of the dense loop (`costs`).
UPDATES = {
    "sudoku": {"NGC": 2000, "dense looped": 2500},
    "maze": {"NGC": 1500, "dense looped": 1875},
}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"model.width": 64, "model.hidden": 128},
    "dense looped": SMALL_DENSE,
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The fraction of puzzles solved, by level and rounds."""
    trained = load(workdir)

    def fraction(difficulty: int, rounds: int) -> float:
        return examine(
            trained.model, trained.params, trained.config, difficulty, EXAMPLES, rounds=rounds
        )["exact"]

    return {
        f"level {level}, {rounds} rounds": fraction(difficulty, rounds)
        for level, difficulty in enumerate(LEVELS[trained.config.data.task], 1)
        for rounds in ROUNDS
    }


def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
    """The time of training relative to the dense loop."""
    dense = {config.data.task: config for config in configs if config.model.rule == "dense"}

    def column(config: ConfigDict, reference: ConfigDict) -> dict[str, str]:
        (one,) = overhead(reference, [config])
        time = one.time * config.train.steps / reference.train.steps
        return {"training time (dense looped = 1)": f"{time:.2f}"}

    return [column(config, dense[config.data.task]) for config in configs]


def solved(results: Results, group: Group, level: int) -> np.ndarray:
    """The fraction solved: [seed, rounds]."""
    return np.array(
        [[*results.of(group, f"level {level}, {rounds} rounds").values()] for rounds in ROUNDS]
    ).T


def answer(results: Results) -> list[Block]:
    """The fraction solved over rounds, and what rounds add in each run."""
    levels = {
        group.name: {n: solved(results, group, n) for n in (1, 2, 3)} for group in results.groups
    }

    def draw(canvas: Any) -> None:
        grid = canvas.subplots(len(PUZZLES), 3, sharex=True, sharey=True)
        for of_puzzle, puzzle in zip(grid, PUZZLES, strict=True):
            for group in (group for group in results.groups if group.labels["puzzle"] == puzzle):
                style = looks(results)[group.name]
                for axis, (level, shown) in zip(of_puzzle, levels[group.name].items(), strict=True):
                    axis.plot(ROUNDS, shown.mean(axis=0), label=group.title, **style)
                    ends, colour = (shown.min(axis=0), shown.max(axis=0)), style["color"]
                    axis.fill_between(ROUNDS, *ends, color=colour, alpha=0.15, linewidth=0)
                    axis.set(title=f"{puzzle}, level {level}", xscale="log", ylim=(-0.02, 1.02))
                    axis.set_xticks(ROUNDS, [*map(str, ROUNDS)])
                    axis.minorticks_off()
            of_puzzle[0].set_ylabel("fraction solved")
            of_puzzle[-1].legend(loc="upper right")
        for axis in grid[-1]:
            axis.set_xlabel("rounds in the test")

    rows = []
    for group in results.groups:
        for level, values in levels[group.name].items():
            more = values[:, 1:] - values[:, :1]
            up = [
                f"{interval(gains.tolist())}\n{np.sum(gains > 0)} of {len(gains)} seeds higher"
                for gains in more.T
            ]
            rows.append([*group.labels.values(), str(level), *up])
    head = ["puzzle", "model", "level", *(f"{rounds} rounds" for rounds in ROUNDS[1:])]
    caption = (
        f"Puzzles solved with more rounds. Vertical axes: fraction of {EXAMPLES} puzzles of which "
        "all cells are right. Horizontal axes: rounds in the test, logarithmic; training draws two "
        "to six. Lines: means over seeds. Bands: from the lowest to the highest seed."
    )
    said = (
        f"Change of the fraction solved, from {ROUNDS[0]} rounds to the number of rounds of the "
        "column, in the same run: mean and 95% interval over seeds."
    )
    drawn = figure("more_rounds", caption, draw, height=5.0)
    return [heading("More rounds in the test"), drawn, paragraph(said), table(head, rows)]


def sweep(puzzle: str) -> Sweep:
    """Both models, each with its number of updates."""
    models = {
        name: {**fields, **learning(UPDATES[puzzle][name])} for name, fields in MODELS.items()
    }
    return cases("puzzle", {puzzle: PUZZLES[puzzle]}) * cases("model", models) * seeds(3)


STUDY = Study(
    sweep=sweep("sudoku") + sweep("maze"),
    common=COMMON,
    larger=LARGER_TASK,
    measure=measure,
    costs=costs,
    answer=answer,
    tuning=1 / 4,
    outcome=f"level 2, {ROUNDS[0]} rounds",
    baseline={"model": "dense looped"},
    legend={
        "level 2, 4 rounds": "fraction of the puzzles of level 2 that are solved after 4 rounds; "
        "other levels and rounds likewise",
        "training time (dense looped = 1)": "measured on the same machine",
    },
)
