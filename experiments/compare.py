"""Is NGC better than X at the same size, or at the same cost? One command:

    python -m experiments.compare --protocol=small --seeds=3 --workdir=runs/compare

For: every model of a protocol at shares of dense's parameters and FLOPs, each with as many learning rates tried (a
factor of two apart, at a part of the length, with a seed that is not used again), then trained with several seeds.
Killed, it goes on where it was; `--index=I --count=N` takes every Nth model, for array jobs, and a call without them
then reports. Writes results.md, rows.csv and pareto.png beside the runs. Not for: ablations of one model.
"""

import csv
import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from experiments.overhead import overhead
from experiments.runs import flags, options, tune
from experiments.stats import interval
from ngc_jax import budget, count
from ngc_jax.config import base, make_model
from ngc_jax.data.tokens import Bytes

LOOPED = {"model.rule": "dense", "model.groups": 4}  # groups of a dense model: heads, and what gates act on
DENSE = {**LOOPED, "model.prelude": 4, "model.core": 0, "model.coda": 0}
LOW_RANK = {"model.rule": "broadcast", "model.p_intra": 0, "model.match_by": "p_inter"}
CLASSIC = {"model.exchange_activation": "none", "model.qk_norm": False}
STILL = {"stability.every": 0}
MODELS: dict[str, dict[str, Any]] = {  # the fields in which each differs from base(), and its learning rate
    "NGC": {"rate": 1e-2},
    "NGC, p = 1": {"rate": 1e-2, "model.p_inter": 1},
    "dense": {"rate": 5e-3, **DENSE},
    "encapsulated": {"rate": 5e-3, **DENSE, "model.gates": True},
    "dense looped": {"rate": 5e-3, **LOOPED},
    "low rank": {"rate": 3e-3, **LOW_RANK},
    "CoLA": {"rate": 5e-3, **DENSE, **LOW_RANK, **CLASSIC, "model.message_activation": "silu"},
    "block-diagonal": {"rate": 1e-2, "model.rule": "none"},
    "BDH": {"rate": 5e-3, "model.kind": "bdh", "model.width": 64, "model.hidden": 1024, "model.rounds": 4, **STILL},
}
SOURCE = pathlib.Path(__file__).parent.parent / "ngc_jax"  # a short text, for a short run


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is trained, and for how long."""

    common: dict[str, Any]  # fields of every run
    shares: tuple[str, ...]  # of configs/dense_small.py: "0.32", or "1:flops"
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)  # of a model's learning rate, that are tried; one alone is taken
    tuning: float = 0.5  # of the steps, the length of a run that tries one
    timed: bool = True  # whether the time of an update is measured against dense_small's


PROTOCOLS = {
    "smoke": Protocol(
        {
            "train.steps": 10,
            "train.warmup_steps": 2,
            "train.batch_size": 4,
            "data.context": 32,
            "data.path": str(SOURCE),
            **STILL,
        },
        shares=("0.25",),
        factors=(1.0,),
        timed=False,
    ),
    "small": Protocol({"train.steps": 1000}, shares=("0.12", "0.22", "0.32", "1", "1:flops")),
}


@dataclasses.dataclass
class Entry:
    """One model at one share."""

    model: str
    share: str
    fields: dict[str, Any]
    config: ConfigDict  # with its sizes solved
    rate: float = math.nan
    losses: list[float] = dataclasses.field(default_factory=list)
    pace: float = math.nan  # time of an update over dense_small's

    @functools.cached_property
    def flops(self) -> int:
        """Of the products of a forward pass, per token."""
        return budget.cost(self.config, "flops") // self.config.data.context

    @functools.cached_property
    def stored(self) -> count.Parameters:
        return count.parameters(jax.eval_shape(make_model(self.config, Bytes.vocab).init, jax.random.key(0)))

    @property
    def name(self) -> str:
        return f"{self.model}-{self.share}".replace(", ", "-").replace(" = ", "").replace(" ", "-").replace(":", "-")


def entries(protocol: Protocol, chosen: list[str]) -> list[Entry]:
    """All models at all shares, with the sizes that their share makes. Raises UserError where a share cannot be met."""
    made = []
    for share in protocol.shares:
        for model in chosen:
            fields = {**MODELS[model], **protocol.common, "model.match": f"dense_small:{share}"}
            del fields["rate"]
            config = base()
            config.update_from_flattened_dict(fields)
            budget.resolve(config)
            made.append(Entry(model, share, fields, config))
    return made


def learn(home: pathlib.Path, found: list[Entry], protocol: Protocol, seeds: int, jobs: int) -> None:
    """Choose each one's learning rate, then train it with each seed."""

    named = {entry.name: entry for entry in found}

    def run(name: str, rate: float, seed: int, share: float) -> list[str]:
        steps = round(share * named[name].config.train.steps)
        more = {"seed": seed, "train.steps": steps, "train.learning_rate": rate, "train.state_learning_rate": rate}
        return flags("configs/ngc_small.py", {**named[name].fields, **more})

    rates = {name: [MODELS[e.model]["rate"] * factor for factor in protocol.factors] for name, e in named.items()}
    tuned = tune(home, rates, run, seeds=range(seeds), share=protocol.tuning, jobs=jobs)
    for name, entry in named.items():
        entry.rate, entry.losses = tuned[name].rate, tuned[name].losses


def report(home: pathlib.Path, protocol: str, found: list[Entry], seeds: int) -> str:
    """The table, as Markdown; rows.csv and pareto.png beside it."""
    with (home / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "share", "seed", "loss", "learning_rate", "matrices", "parameters", "flops_per_token"])
        lines = [
            f"Made by `python -m experiments.compare --protocol={protocol} --seeds={seeds}`; loss in nats per byte",
            "on the whole held-out text, mean and 95% interval over seeds; shares of dense_small's matrices, or FLOPs.",
            "",
            "| share | model | loss | matrices | all parameters | FLOPs per token | time of an update / dense_small's "
            "| learning rate |",
            "| --- " * 8 + "|",
        ]
        for entry in found:
            stored = entry.stored
            mean = interval(entry.losses, 4) if len(entry.losses) > 1 else f"{entry.losses[0]:.4f}"
            lines.append(
                f"| {entry.share} | {entry.model} | {mean} | {stored.matrices:,} | {stored.total:,} | {entry.flops:,} "
                f"| {'not measured' if math.isnan(entry.pace) else f'{entry.pace:.2f}'} | {entry.rate:g} |"
            )
            for seed, loss in enumerate(entry.losses):
                cost = (stored.matrices, stored.total, entry.flops)
                rows.writerow([entry.model, entry.share, seed, f"{loss:.6f}", f"{entry.rate:g}", *cost])
    draw(home, found)
    return "\n".join(lines) + "\n"


def draw(home: pathlib.Path, found: list[Entry]) -> None:
    """Held-out loss against matrix parameters, and against FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    costs: tuple[Callable[[Entry], int], ...] = (lambda entry: entry.stored.matrices, lambda entry: entry.flops)
    for axis, cost in zip(axes, costs, strict=True):
        for model in dict.fromkeys(entry.model for entry in found):
            of_model = [entry for entry in found if entry.model == model]
            points = sorted((cost(entry), statistics.mean(entry.losses)) for entry in of_model)
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=model)
        axis.set_xscale("log")
    axes[0].set(xlabel="parameters in matrices", ylabel="held-out loss (nats per byte)")
    axes[1].set(xlabel="FLOPs of the products, per token")
    axes[1].legend(fontsize=7, frameon=False)
    figure.savefig(home / "pareto.png")


def main() -> None:
    parser = options(__doc__, "runs/compare")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small")
    parser.add_argument("--seeds", type=int, default=3, help="of the final runs")
    parser.add_argument("--models", default="", help="some of the protocol's, with semicolons; default: all")
    parser.add_argument("--index", type=int, help="take models index, index + count, ... only, and write no report")
    parser.add_argument("--count", type=int, default=1)
    args = parser.parse_args()
    protocol, home = PROTOCOLS[args.protocol], args.workdir.absolute()
    chosen = [name.strip() for name in args.models.split(";")] if args.models else list(MODELS)
    unknown = set(chosen) - set(MODELS)
    if unknown:
        parser.error(f"--models: no {sorted(unknown)}; there are: {'; '.join(MODELS)}")
    found = entries(protocol, chosen)
    mine = found if args.index is None else found[args.index :: args.count]
    learn(home, mine, protocol, args.seeds, args.jobs)
    if args.index is not None:
        return
    reference = base()
    reference.update_from_flattened_dict({**DENSE, **protocol.common})
    for entry in found if protocol.timed else []:
        entry.pace = overhead(entry.config, reference).time
    text = report(home, args.protocol, found, args.seeds)
    (home / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
