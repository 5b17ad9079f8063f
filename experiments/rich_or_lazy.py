"""Do weights of low rank at start make for richer learning? One command:

    python -m experiments.rich_or_lazy --workdir=runs/rich_or_lazy --jobs=2

For: NGC and dense loops whose weights start with rank 4, 16 or as drawn (`model.init_rank`), the question that
arXiv 2310.08513 asks of recurrent networks: held-out loss, effective ranks at start and at the end, how far parameters
and weights moved, and how far the tangent kernel turned. Three seeds each. Killed, it goes on where it was. Writes
results.md beside the runs. Not for: which of the two models is better.
"""

import pathlib
import statistics
from typing import Any

import jax

from experiments.runs import flags, options, train
from experiments.stats import interval
from ngc_jax.core.laziness import alignment, movement
from ngc_jax.data.batches import held_out_batches
from ngc_jax.evaluate import data_of
from ngc_jax.nn.decoder import Decoder
from ngc_jax.stability.learning import effective_ranks, generated, logit_kernel, movements
from ngc_jax.steps import init_state
from ngc_jax.workdir import command, open_trained

SEEDS, STEPS = (0, 1, 2), 400
RANKS = {4: "4", 16: "16", 0: "as drawn"}
WINDOWS = 32  # of held-out text, for the kernel
RATES = {"addressed": 1e-2, "dense": 5e-3}  # of configs/ngc_small.py and dense_small.py
KINDS = {"addressed": "NGC", "dense": "dense"}
kernel = jax.jit(logit_kernel, static_argnums=0)


def folder(rule: str, rank: int, seed: int) -> str:
    return f"{rule}-rank{rank}-seed{seed}"


def mean_rank(model: Decoder, params: Any) -> float:
    """The mean of effective ranks over all weight matrices."""
    return statistics.mean(rank for stage in effective_ranks(model, params).values() for rank in stage.values())


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """What learning did to one run's model."""
    trained = open_trained(workdir)
    config, model, after = trained.config, trained.decoder, trained.state.params
    before = jax.jit(lambda: init_state(model, config.train, config.seed).params)()
    windows = data_of(trained, workdir).validation
    tokens = next(held_out_batches(windows, batch_size=WINDOWS, limit=WINDOWS))[0][:, 0]
    return {
        "effective rank at start": mean_rank(model, before),
        "at the end": mean_rank(model, after),
        "parameters moved": movements(before, after)["matrix" if config.model.rule == "dense" else "state"],
        "weights moved": float(movement(generated(model, before), generated(model, after))),
        "kernel turned": float(1 - alignment(kernel(model, before, tokens), kernel(model, after, tokens))),
    }


def report(losses: dict[str, float], found: dict[str, dict[str, float]]) -> str:
    """The table, as Markdown, from each run's loss and measures."""
    measures = list(found[folder("dense", 0, 0)])
    lines = [
        "Made by `python -m experiments.rich_or_lazy`; means and 95% intervals over seeds 0, 1, 2.",
        "",
        "| model | rank at start | held-out loss | " + " | ".join(measures) + " |",
        "| --- " * (3 + len(measures)) + "|",
    ]
    for rule, kind in KINDS.items():
        for rank, said in RANKS.items():
            names = [folder(rule, rank, seed) for seed in SEEDS]
            cells = [interval([losses[name] for name in names])]
            cells += [interval([found[name][measured] for name in names]) for measured in measures]
            lines.append(f"| {kind} | {said} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = options(__doc__, "runs/rich_or_lazy")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates of a run")
    args = parser.parse_args()
    home = args.workdir.absolute()
    common = {"train.steps": args.steps, "train.warmup_steps": args.steps // 10, "stability.every": 0}
    common |= {"eval.every": args.steps, "checkpoint.every_steps": args.steps}
    runs = {}
    for seed in SEEDS:
        for rank in RANKS:
            for rule, rate in RATES.items():
                rates = {"train.learning_rate": rate, "train.state_learning_rate": rate}
                fields = {"seed": seed, "model.rule": rule, "model.init_rank": rank, **rates, **common}
                runs[folder(rule, rank, seed)] = flags("configs/ngc_tiny.py", fields)
    losses = train(home, runs, args.jobs)
    text = report(losses, {name: measure(home / name) for name in runs})
    (home / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    command(main)
