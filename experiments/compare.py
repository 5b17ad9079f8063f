"""Is NGC better than X at the same size, or at the same cost? One command:

    python -m experiments.compare --protocol=small --seeds=3 --workdir=runs/compare

For: every model of a protocol at shares of dense's parameters and FLOPs, each with as many learning rates tried (a
factor of two apart, at a part of the length, with a seed that is not used again), then trained with several seeds.
Killed, it goes on where it was; `--index=I --count=N` takes every Nth model, for array jobs, and a call without them
then reports. Writes results.md, rows.csv and pareto.png beside the runs. Not for: which models there
are (`protocols.py`), or ablations of one of them.
"""

import csv
import dataclasses
import functools
import math
import pathlib
import statistics
from collections.abc import Callable

import jax

from experiments.overhead import Overhead, model_of, overhead
from experiments.protocols import MODELS, PROTOCOLS, Protocol, Sized, sized
from experiments.runs import flags, options, tune
from experiments.stats import interval
from ngc_jax import budget, count


@dataclasses.dataclass
class Entry:
    """What came of one model at one share."""

    of: Sized
    rate: float = math.nan  # the best learning rate
    losses: list[float] = dataclasses.field(default_factory=list)  # one a seed
    cost: Overhead | None = None  # of an update, over dense's

    @functools.cached_property
    def flops(self) -> int:
        """Of the products of a forward pass, per token."""
        return budget.cost(self.of.config, "flops") // self.of.config.data.context

    @functools.cached_property
    def stored(self) -> count.Parameters:
        return count.parameters(jax.eval_shape(model_of(self.of.config).init, jax.random.key(0)))


def learn(home: pathlib.Path, entries: list[Entry], protocol: Protocol, seeds: int, jobs: int) -> None:
    """Choose each one's learning rate, then train it with each seed."""
    named = {entry.of.name: entry for entry in entries}

    def run(name: str, rate: float, seed: int, share: float) -> list[str]:
        of = named[name].of
        steps = round(share * of.config.train.steps)
        more = {"seed": seed, "train.steps": steps, "train.learning_rate": rate, "train.state_learning_rate": rate}
        return flags(f"configs/{protocol.config}.py", {**of.fields, **more})

    rates = {name: [entry.of.rate * factor for factor in protocol.factors] for name, entry in named.items()}
    tuned = tune(home, rates, run, seeds=range(seeds), share=protocol.tuning, jobs=jobs)
    for name, entry in named.items():
        entry.rate, entry.losses = tuned[name].rate, tuned[name].losses


def report(home: pathlib.Path, protocol: str, entries: list[Entry], seeds: int) -> str:
    """The table, as Markdown; rows.csv and pareto.png beside it."""
    costs = ["matrices", "parameters", "flops_per_token", "peak_MiB", "time_of_an_update"]
    with (home / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["model", "share", "seed", "loss", "learning_rate", *costs])
        lines = [
            f"Made by `python -m experiments.compare --protocol={protocol} --seeds={seeds}`; loss in nats per token on",
            f"the whole held-out text, mean and 95% interval over seeds; shares of {PROTOCOLS[protocol].dense}'s",
            "parameters in matrices, or FLOPs; peak memory is that of the compiled update.",
            "",
            "| share | model | loss | matrices | all parameters | FLOPs per token | peak MiB "
            "| time of an update / dense's | learning rate |",
            "| --- " * 9 + "|",
        ]
        for entry in entries:
            of, stored = entry.of, entry.stored
            mean = interval(entry.losses, 4) if len(entry.losses) > 1 else f"{entry.losses[0]:.4f}"
            measured = [f"{entry.cost.peak / 2**20:,.0f}", f"{entry.cost.time:.2f}"] if entry.cost else ["-", "-"]
            lines.append(
                f"| {of.share} | {of.model} | {mean} | {stored.matrices:,} | {stored.total:,} | {entry.flops:,} "
                f"| {measured[0]} | {measured[1]} | {entry.rate:g} |"
            )
            for seed, loss in enumerate(entry.losses):
                counted = (stored.matrices, stored.total, entry.flops, *measured)
                rows.writerow([of.model, of.share, seed, f"{loss:.6f}", f"{entry.rate:g}", *counted])
    draw(home, entries)
    return "\n".join(lines) + "\n"


def draw(home: pathlib.Path, entries: list[Entry]) -> None:
    """Held-out loss against matrix parameters, and against FLOPs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    costs: tuple[Callable[[Entry], int], ...] = (lambda entry: entry.stored.matrices, lambda entry: entry.flops)
    for axis, cost in zip(axes, costs, strict=True):
        for model in dict.fromkeys(entry.of.model for entry in entries):
            of_model = [entry for entry in entries if entry.of.model == model]
            points = sorted((cost(entry), statistics.mean(entry.losses)) for entry in of_model)
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=model)
        axis.set_xscale("log")
    axes[0].set(xlabel="parameters in matrices", ylabel="held-out loss (nats per token)")
    axes[1].set(xlabel="FLOPs of the products, per token")
    axes[1].legend(fontsize=7, frameon=False)
    figure.savefig(home / "pareto.png")


def main() -> None:
    parser = options(__doc__, "runs/compare")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small")
    parser.add_argument("--seeds", type=int, default=3, help="of the final runs")
    parser.add_argument("--models", default="", help="some of the protocol's, with semicolons; default: all")
    parser.add_argument("--path", default="", help="the text, a file or a folder; default: the protocol's own")
    parser.add_argument("--index", type=int, help="take models index, index + count, ... only, and write no report")
    parser.add_argument("--count", type=int, default=1)
    args = parser.parse_args()
    protocol, home = PROTOCOLS[args.protocol], args.workdir.absolute()
    chosen = [name.strip() for name in args.models.split(";")] if args.models else list(MODELS)
    unknown = set(chosen) - set(MODELS)
    if unknown:
        parser.error(f"--models: no {sorted(unknown)}; there are: {'; '.join(MODELS)}")
    if protocol.needs_path and not args.path:
        parser.error(f"--protocol={args.protocol} wants --path=FILE, the text of tiny Shakespeare, 1,115,394 bytes")
    entries = [Entry(of) for of in sized(protocol, chosen, args.path and str(pathlib.Path(args.path).absolute()))]
    mine = entries if args.index is None else entries[args.index :: args.count]
    learn(home, mine, protocol, args.seeds, args.jobs)
    if args.index is not None:
        return
    if protocol.measured:
        (reference,) = sized(dataclasses.replace(protocol, shares={"1": ("dense",)}), ["dense"], args.path)
        for entry, cost in zip(entries, overhead(reference.config, (e.of.config for e in entries)), strict=True):
            entry.cost = cost
    text = report(home, args.protocol, entries, args.seeds)
    (home / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
