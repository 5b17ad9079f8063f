"""Is NGC better than other models at the same size, or at the same cost? One command:

    python -m experiments.compare --protocol=small --seeds=3 --workdir=runs/compare

For: all models of a protocol, at sizes relative to its dense model. Learning rates a factor of two
apart are tried in runs of four fifths of the length, with a seed of their own; the best is trained
with all seeds. The study continues after a kill. For array jobs, `--index=I --count=N` takes every
Nth model; a call without them then makes the report (`report.py`). Each model is compared with the
dense model of its size, and NGC also with the largest. Not for: the models (`protocols.py`), or
ablations of one model.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.arguments import arguments, at_least
from experiments.overhead import overhead
from experiments.protocols import MODELS, PROTOCOLS, Protocol, sized
from experiments.run import carry_out
from experiments.stats import ratio
from experiments.study import LOSS, Results, Study
from experiments.sweeps import Sweep, Variant, seeds
from ngc_jax.commands.arguments import command
from ngc_jax.report.blocks import Block, paragraph, table
from ngc_jax.runtime.files import expand


def study(protocol: Protocol, chosen: list[str], count: int, path: str = "") -> Study:
    """A protocol's models, each at the sizes that the protocol names for it."""
    variants = Sweep(
        Variant(
            {"model": of.model, "size": of.share},
            {**of.fields, "rate": tuple(of.rate * factor for factor in protocol.factors)},
        )
        for of in sized(protocol, chosen, path)
    )
    time = f"update time ({protocol.dense} = 1)"

    def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
        reference = sized(protocol.only_dense, ["dense"], path)[0].config
        return [
            {"peak memory (MiB)": f"{cost.peak / 2**20:,.0f}", time: f"{cost.time:.2f}"}
            for cost in overhead(reference, configs)
        ]

    dense = "dense" in chosen
    return Study(
        sweep=variants * seeds(count),
        config=protocol.config,
        tuning=protocol.tuning,
        baseline={"model": "dense"} if dense else None,  # of the same size
        costs=costs if protocol.measured else None,
        legend={
            "size": f"0.32: 32% of the parameters in matrices of {protocol.dense}; 1:flops: as "
            f"many FLOPs in a forward pass as {protocol.dense}",
            "difference": f"{LOSS}, minus that of the dense model of the same size; paired by seed",
            "peak memory (MiB)": "of the compiled update",
            time: f"median time of an update, relative to {protocol.dense} on the same machine",
        },
        answer=against_largest_dense if dense else None,
    )


def against_largest_dense(results: Results) -> list[Block]:
    """NGC of each size beside the largest dense model."""
    costs = dict(zip((group.name for group in results.groups), results.costs, strict=True))
    dense = [group for group in results.groups if group.labels["model"] == "dense"]
    full = max(dense, key=lambda group: costs[group.name].matrices)
    losses = results.of(full, LOSS)
    rows = [
        [
            *group.labels.values(),
            f"{costs[group.name].matrices:,}",
            ratio(results.of(group, LOSS), losses),
        ]
        for group in results.groups
        if group.labels["model"].startswith("NGC")
    ]
    said = (
        f"Ratio: NGC's {LOSS} over that of the largest dense model, with "
        f"{costs[full.name].matrices:,} parameters in matrices; paired by seed, mean and 95% "
        "interval. Below 1 NGC is better."
    )
    head = ["model", "size", "parameters in matrices", "ratio"]
    return [paragraph(said), table(head, rows)] if rows else []


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small")
    told = "number of seeds of the final runs"
    parser.add_argument("--seeds", type=at_least(1), default=3, help=told)
    parser.add_argument(
        "--models", default="", help="models of the protocol, separated by semicolons; default: all"
    )
    parser.add_argument(
        "--path", default="", help="the text: a file or folder; default: the protocol's own"
    )
    args, changes = parser.parse_known_args()
    protocol = PROTOCOLS[args.protocol]
    chosen = [name.strip() for name in args.models.split(";")] if args.models else list(MODELS)
    unknown = set(chosen) - set(MODELS)
    if unknown:
        parser.error(f"--models: {sorted(unknown)} not known; give some of: {'; '.join(MODELS)}")
    if protocol.needs_path and not args.path:
        parser.error(
            f"--protocol={args.protocol} needs --path=FILE: tiny Shakespeare, 1,115,394 bytes"
        )
    path = args.path and str(expand(args.path).absolute())
    about = f"Is NGC better at the same size, or at the same cost? Protocol {args.protocol}"
    compared = study(protocol, chosen, args.seeds, path)
    carry_out(compared, "compare", f"compare-{args.protocol}", about, args, changes)


if __name__ == "__main__":
    command(main, goes_on=True)
