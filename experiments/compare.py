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
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from benchmarks.exponents import ratio
from experiments.protocols import MODELS, PROTOCOLS, Protocol, Sized, sized
from experiments.runs import flags, options, tune
from experiments.stats import interval
from ngc_jax import budget, count
from ngc_jax.config import make_model
from ngc_jax.data.tokens import Bytes
from ngc_jax.nn.model import LanguageModel
from ngc_jax.steps import init_state, make_train_step


@dataclasses.dataclass
class Entry:
    """What came of one model at one share."""

    of: Sized
    rate: float = math.nan  # the best learning rate
    losses: list[float] = dataclasses.field(default_factory=list)  # one a seed
    pace: float = math.nan  # time of an update over dense's
    peak: float = math.nan  # MiB that an update needs at once

    @functools.cached_property
    def flops(self) -> int:
        """Of the products of a forward pass, per token."""
        return budget.cost(self.of.config, "flops") // self.of.config.data.context

    @functools.cached_property
    def stored(self) -> count.Parameters:
        return count.parameters(jax.eval_shape(model_of(self.of.config).init, jax.random.key(0)))


def model_of(config: ConfigDict) -> LanguageModel:
    return make_model(config, Bytes.vocab if config.data.tokenizer == "bytes" else config.data.vocab_size)


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


def measure(entries: list[Entry], reference: ConfigDict) -> None:
    """Compile each one's update: the memory it needs, and its time over the reference's, one after the other."""

    def update(config: ConfigDict) -> tuple[Any, Any]:
        model = model_of(config)
        state = jax.jit(lambda: init_state(model, config.train, 0))()
        step = jax.jit(make_train_step(model, config.train, Bytes.mark, False))
        compiled = step.lower(state, batch).compile()
        return compiled, lambda batch: compiled(state, batch)

    batch = jnp.zeros((reference.train.batch_size, reference.data.context + 1), jnp.int32)
    _, theirs = update(reference)
    for entry in entries:
        compiled, ours = update(entry.of.config)
        entry.peak, entry.pace = count.peak_bytes(compiled) / 2**20, ratio(theirs, ours, batch)


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
            measured = ("-", "-") if math.isnan(entry.pace) else (f"{entry.peak:,.0f}", f"{entry.pace:.2f}")
            lines.append(
                f"| {of.share} | {of.model} | {mean} | {stored.matrices:,} | {stored.total:,} | {entry.flops:,} "
                f"| {measured[0]} | {measured[1]} | {entry.rate:g} |"
            )
            for seed, loss in enumerate(entry.losses):
                cost = (stored.matrices, stored.total, entry.flops, f"{entry.peak:.1f}", f"{entry.pace:.3f}")
                rows.writerow([of.model, of.share, seed, f"{loss:.6f}", f"{entry.rate:g}", *cost])
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
        measure(entries, reference.config)
    text = report(home, args.protocol, entries, args.seeds)
    (home / "results.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
