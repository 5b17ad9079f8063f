"""Do puzzles gain from rounds of the loop, more than training had?

Sudokus of four digits and mazes, answered in place: NGC against a dense loop of as many parameters
that is trained for as long, both with two to six rounds in training, drawn anew for each update,
and four to 32 in the test. Levels 1 and 2 are difficulties of training, level 3 is beyond it: 4, 8
and 11 empty cells; 3, 4 and 5 rooms a side. All cells must be right.

    python -m experiments.run puzzles
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.blocks import Block, Heading, Table, Words
from experiments.figures import legend, picture
from experiments.overhead import overhead
from experiments.setting import LARGER_TASK, SMALL_DENSE, learning
from experiments.stats import interval
from experiments.study import Group, Results, Study
from experiments.sweeps import Sweep, cases, seeds
from ngc_jax.training.evaluation import examine
from ngc_jax.training.load import load

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
UPDATES = {
    "sudoku": {"NGC": 2000, "dense looped": 2500},
    "maze": {"NGC": 1500, "dense looped": 1875},
}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"model.width": 64, "model.hidden": 128},
    "dense looped": SMALL_DENSE,
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The share of puzzles solved, by level and rounds."""
    trained = load(workdir)

    def share(difficulty: int, rounds: int) -> float:
        return examine(
            trained.model, trained.params, trained.config, difficulty, EXAMPLES, rounds=rounds
        )["exact"]

    return {
        f"level {level}, {rounds} rounds": share(difficulty, rounds)
        for level, difficulty in enumerate(LEVELS[trained.config.data.task], 1)
        for rounds in ROUNDS
    }


def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
    """How long training takes against the dense loop's."""
    dense = {config.data.task: config for config in configs if config.model.rule == "dense"}

    def column(config: ConfigDict, reference: ConfigDict) -> dict[str, str]:
        (one,) = overhead(reference, [config])
        return {
            "training time, dense = 1": f"{one.time * config.train.steps / reference.train.steps:.2f}"
        }

    return [column(config, dense[config.data.task]) for config in configs]


def solved(results: Results, group: Group, level: int) -> np.ndarray:
    """The share solved: [seed, rounds]."""
    return np.array(
        [[*results.of(group, f"level {level}, {rounds} rounds").values()] for rounds in ROUNDS]
    ).T


def answer(results: Results) -> list[Block]:
    """The share solved over rounds, and what rounds add, run by run."""
    levels = {
        group.name: {n: solved(results, group, n) for n in (1, 2, 3)} for group in results.groups
    }

    def draw(canvas: Any) -> None:
        for axis, puzzle in zip(
            canvas.subplots(1, len(PUZZLES), sharey=True), PUZZLES, strict=True
        ):
            for group in (group for group in results.groups if group.labels["puzzle"] == puzzle):
                model = [*MODELS].index(group.labels["model"])
                for level, shares in levels[group.name].items():
                    style = {
                        "color": f"C{level - 1}",
                        "linestyle": ("-", "--")[model],
                        "marker": "os"[model],
                    }
                    label = f"level {level}, {group.labels['model']}"
                    axis.plot(
                        ROUNDS,
                        shares.mean(axis=0),
                        label=label,
                        linewidth=1.2,
                        markersize=3,
                        **style,
                    )
            axis.set(title=puzzle, xlabel="rounds at test time", xscale="log", ylim=(-0.02, 1.02))
            axis.set_xticks(ROUNDS, [*map(str, ROUNDS)])
            axis.minorticks_off()
        canvas.axes[0].set_ylabel("share solved")
        legend(canvas, canvas.axes[0])

    rows = []
    for group in results.groups:
        for level, shares in levels[group.name].items():
            more = shares[:, 1:] - shares[:, :1]
            up = [
                f"{interval(gains.tolist())} ({np.sum(gains > 0)} of {len(gains)} up)"
                for gains in more.T
            ]
            rows.append([*group.labels.values(), str(level), *up])
    head = ["puzzle", "model", "level", *(f"{rounds} rounds" for rounds in ROUNDS[1:])]
    caption = f"Training draws two to six rounds; all cells of {EXAMPLES} problems right, means over seeds."
    figure = picture("more_rounds", caption, draw, width=9.0)
    said = f"What they add to the share solved after {ROUNDS[0]}, in the same run: mean and 95% interval over seeds."
    return [Heading("More rounds at test time"), figure, Words(said), Table(head, rows)]


def sweep(puzzle: str) -> Sweep:
    """Both models, each for its number of updates."""
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
)
