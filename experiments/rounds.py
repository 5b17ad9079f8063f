"""Do trained loops settle, and may they go on for longer than they were trained? Two questions, one command:

    python -m experiments.rounds --workdir=runs/rounds --jobs=2

For: (a) contraction and exponents over training, of models that were not told to contract, and of some that were;
(b) held-out loss at 1 to 16 rounds at test time, and whether the exponent of the trained loop foretells what more
rounds do. Three seeds each. Killed, it goes on where it was. Writes results.md and figures beside the runs. Not for:
how good the models are.
"""

import math
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.runs import flags, options, train
from experiments.stats import interval
from ngc_jax.data.tokens import load_tokens
from ngc_jax.evaluate import compile_eval, held_out
from ngc_jax.mesh import single
from ngc_jax.metrics import read_rows
from ngc_jax.workdir import open_trained

SEEDS, STEPS = (0, 1, 2), 400
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
DENSE = {"model.rule": "dense", "train.learning_rate": 3e-3, "train.state_learning_rate": 3e-3}
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


def folder(model: str, seed: int) -> str:
    return model.replace(", ", "-").replace(" ", "-") + f"-seed{seed}"


def at_rounds(workdir: pathlib.Path) -> dict[int, float]:
    """Held-out loss of a trained loop, run for other numbers of rounds than it was trained for."""
    trained = open_trained(workdir)
    config = trained.config
    tokens, mesh = load_tokens(config.data), single()
    losses = {}
    for rounds in TEST_ROUNDS:
        step = compile_eval(trained.decoder.at(rounds), config, mesh, tokens)
        losses[rounds] = held_out(step, trained.params, config, mesh, tokens, 512)["loss"]
    jax.clear_caches()
    return losses


def over_training(home: pathlib.Path, axes: dict[str, Any]) -> list[str]:
    """Question (a): a table of first and last values, and curves."""
    lines = ["| model | measure | after 100 updates | at the end |", "| --- | --- | --- | --- |"]
    for model in MODELS:
        rows = [read_rows(home / folder(model, seed)) for seed in SEEDS]
        for name, label in WATCHED.items():
            curves = [[(row["step"], row[name]) for row in run if name in row] for run in rows]
            if not curves[0]:
                continue
            first, last = ([curve[i][1] for curve in curves] for i in (0, -1))
            lines.append(f"| {model} | {label} | {interval(first)} | {interval(last)} |")
            if name in axes:
                mean = np.mean([[value for _, value in curve] for curve in curves], axis=0)
                axes[name].plot([at for at, _ in curves[0]], mean, label=model)
    return lines


def beyond(home: pathlib.Path, axis: Any) -> list[str]:
    """Question (b): loss by rounds at test time, and the rank correlation of its rise with the exponent."""
    lines = [
        "| held-out loss at this many rounds | " + " | ".join(map(str, TEST_ROUNDS)) + " |",
        "| --- " * (1 + len(TEST_ROUNDS)) + "|",
    ]
    exponents, rises = [], []
    for model, fields in MODELS.items():
        if fields.get("model.core") == 0:
            continue
        losses = [at_rounds(home / folder(model, seed)) for seed in SEEDS]
        lines.append(f"| {model} | " + " | ".join(interval([run[r] for run in losses]) for r in TEST_ROUNDS) + " |")
        axis.plot(TEST_ROUNDS, np.mean([list(run.values()) for run in losses], axis=0), "o-", markersize=3, label=model)
        for seed, run in zip(SEEDS, losses, strict=True):
            rows = read_rows(home / folder(model, seed))
            last = {name: value for row in rows for name, value in row.items()}
            exponents.append(last["stability/exponent_per_round"])
            rises.append(run[16] - run[fields["model.rounds"]])
    ranks = [np.argsort(np.argsort(values)) for values in (exponents, rises)]
    observed = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    shuffle = np.random.default_rng(0)
    chance = [np.corrcoef(ranks[0], shuffle.permutation(ranks[1]))[0, 1] for _ in range(10_000)]
    p = float(np.mean(np.abs(chance) >= abs(observed)))
    lines += [
        "",
        f"Rank correlation, over {len(rises)} trained loops, of the leading exponent per round with the rise of the "
        f"loss from the trained number of rounds to 16: {observed:.2f} (permutation p = {p:.4f}).",
    ]
    return lines


def main() -> None:
    from matplotlib.figure import Figure

    args = options(__doc__, "runs/rounds").parse_args()
    home = args.workdir.absolute()
    runs = {
        folder(model, seed): flags("configs/ngc_small.py", {"seed": seed, **COMMON, **fields})
        for seed in SEEDS
        for model, fields in MODELS.items()
    }
    train(home, runs, args.jobs)

    figure = Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    trained = over_training(home, {"stability/contraction_per_round": left, "stability/exponent_per_round": middle})
    tested = beyond(home, right)
    left.set(xlabel="updates", ylabel="contraction per round", title="below 1: a round's step shrinks")
    middle.set(xlabel="updates", ylabel="leading exponent per round (nats)", title="below 0: neighbours approach")
    right.set(xlabel="rounds at test time", ylabel="held-out loss (nats per byte)", title="longer than trained")
    left.axhline(1, color="black", linewidth=0.5)
    middle.axhline(0, color="black", linewidth=0.5)
    right.set_ylim(top=4)
    right.legend(fontsize=6, frameon=False)
    figure.savefig(home / "rounds.png")
    lines = [
        "Made by `python -m experiments.rounds`; means and 95% intervals over seeds 0, 1, 2.",
        "",
        "## (a) Over training",
        "",
        *trained,
        "",
        "## (b) More rounds at test time",
        "",
        *tested,
    ]
    (home / "results.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
