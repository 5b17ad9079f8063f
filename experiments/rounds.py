"""Do trained loops converge, and can they run for more rounds than in training?

(a) Contraction and exponents during training, for models with and without a contraction penalty;
(b) held-out loss at 1 to 16 rounds in the test, and whether the exponent of the trained loop
predicts the effect of more rounds. The study does not compare the quality of the models.

    python -m experiments.run rounds
"""

import math
import pathlib
from typing import Any

import numpy as np

from experiments.figures import legend, looks
from experiments.stats import interval, p_value
from experiments.study import LOSS, Results, Study
from experiments.sweeps import cases, seeds
from ngc_jax.nn.mesh import single_device
from ngc_jax.report.blocks import Block, heading, paragraph, table
from ngc_jax.report.figures import figure
from ngc_jax.runtime.metrics import latest, read_rows
from ngc_jax.training.evaluation import compile_eval, held_out
from ngc_jax.training.load import load

STEPS = 400
TEST_ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16)
COMMON = {
    "data.context": 64,
    "model.width": 64,
    "model.hidden": 192,
    "train.steps": STEPS,
    "stability.every": 100,
    "stability.tokens": 2048,
    "stability.rounds": 16,
}
DENSE = {"model.rule": "dense", "rate": 3e-3}
MODELS: dict[str, dict[str, Any]] = {
    "NGC, 2 rounds": {"model.rounds": 2},
    "NGC, 4 rounds": {"model.rounds": 4},
    "NGC, 4 rounds, told to contract": {
        "model.rounds": 4,
        "stability.regulariser": "contraction",
        "stability.high": math.log(0.5),
    },
    "dense looped, 4 rounds": {"model.rounds": 4, **DENSE},
    "dense, no loop": {"model.prelude": 4, "model.core": 0, "model.coda": 0, **DENSE},
}
WATCHED = {
    "stability/contraction_per_round": "contraction per round",
    "stability/exponent_per_round": "exponent per round (nats)",
    "stability/exponent_per_stage": "exponent per stage (nats)",
    "stability/contraction_per_token": "slope per token (nats)",
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """Held-out loss of a trained loop at several numbers of rounds."""
    trained = load(workdir, trust=True)  # `run` has just trained it as the study says
    config, shape = trained.config, trained.decoder.shape
    if not shape.core:
        return {}
    data, mesh = trained.data(), single_device()
    losses = {}
    for rounds in TEST_ROUNDS:
        step = compile_eval(trained.decoder.at(rounds), config, mesh, data)
        found = held_out(
            step, trained.params, mesh, data.validation, config.eval.batch_size, limit=512
        )
        losses[f"loss, {rounds} rounds"] = found["loss"]
    return losses


def over_training(results: Results) -> list[Block]:
    """Question (a): a table of first and last values, and curves."""
    rows, drawn = [], dict[tuple[str, str], np.ndarray]()
    for group in results.groups:
        runs = [read_rows(workdir) for workdir in results.workdirs(group).values()]
        for name, label in WATCHED.items():
            curves = np.array(
                [[(row["step"], row[name]) for row in run if name in row] for run in runs]
            )
            if curves.size:
                drawn[group.name, name] = curves.mean(axis=0)
                ends = (interval(curves[:, at, 1].tolist()) for at in (0, -1))
                rows.append([group.title, label, *ends])

    def draw(canvas: Any) -> None:
        axes = canvas.subplots(1, 2)
        for axis, name, neutral in zip(axes, [*WATCHED][:2], (1, 0), strict=True):
            for group in (group for group in results.groups if (group.name, name) in drawn):
                steps, values = drawn[group.name, name].T
                axis.plot(steps, values, label=group.title, **looks(results)[group.name])
            axis.set(xlabel="updates", ylabel=WATCHED[name])
            axis.axhline(neutral, color="black", linewidth=0.5)
        legend(canvas, axes[0])

    caption = (
        "Contraction (left) and leading exponent (right) per round during training. Horizontal "
        "axes: updates. Means over seeds. Below 1 the steps of rounds shrink. Below 0 neighbouring "
        "states approach each other."
    )
    made = table(["model", "measure", "after 100 updates", "at the end"], rows)
    return [heading("During training"), made, figure("over_training", caption, draw, width=9.0)]


def beyond(results: Results) -> list[Block]:
    """Question (b): loss by rounds in the test, and the rank correlation of its rise with the
    exponent.
    """
    losses = {
        group.name: np.array(
            [[*results.of(group, f"loss, {r} rounds").values()] for r in TEST_ROUNDS]
        )
        for group in results.groups
        if f"loss, {TEST_ROUNDS[0]} rounds" in results.measures(group)
    }
    looped = [group for group in results.groups if group.name in losses]

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        for group in looped:
            means, style = losses[group.name].mean(axis=1), looks(results)[group.name]
            axis.plot(TEST_ROUNDS, means, label=group.title, **style)
        axis.set(xlabel="rounds in the test", ylabel=LOSS, ylim=(None, 4))
        legend(canvas, axis)

    exponents, rises = [], []
    for group in looped:
        for workdir in results.workdirs(group).values():
            exponents.append(latest(read_rows(workdir))["stability/exponent_per_round"])
        trained = TEST_ROUNDS.index(group.fields["model.rounds"])
        rises += (losses[group.name][-1] - losses[group.name][trained]).tolist()
    ranks = [np.argsort(np.argsort(values)) for values in (exponents, rises)]
    observed = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    shuffle = np.random.default_rng(0)
    chance = [np.corrcoef(ranks[0], shuffle.permutation(ranks[1]))[0, 1] for _ in range(10_000)]
    p = p_value(float(np.mean(np.abs(chance) >= abs(observed))))
    said = (
        "Rank correlation between the leading exponent per round and the rise of the loss from the "
        f"trained number of rounds to {TEST_ROUNDS[-1]}, over {len(rises)} trained loops: "
        f"{observed:.2f}. p of the permutation test: {p}."
    )
    caption = (
        f"Loss at other numbers of rounds than in training. Vertical axis: {LOSS}. Horizontal "
        "axis: rounds in the test. Means over seeds."
    )
    drawn = figure("more_rounds", caption, draw)
    return [heading("More rounds in the test"), drawn, paragraph(said)]


def answer(results: Results) -> list[Block]:
    """Both questions."""
    return [*over_training(results), *beyond(results)]


STUDY = Study(
    sweep=cases("model", MODELS) * seeds(3),
    common=COMMON,
    measure=measure,
    legend={
        "model": "told to contract: with a penalty that holds the contraction below 0.5",
        "loss, 1 rounds": "held-out loss (nats per token) at 1 round in the test; others likewise",
    },
    answer=answer,
)
