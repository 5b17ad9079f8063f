"""Is NGC better than X at the same size, or at the same cost? One command:

    python -m experiments.compare --protocol=small --seeds=3 --workdir=runs/compare

For: every model of a protocol at shares of dense's parameters and FLOPs, each with as many learning
rates tried (a factor of two apart, for four fifths of the length, with a seed that is not used
again) and then trained with several. Killed, it goes on where it was; `--index=I --count=N` takes
every Nth model, for array jobs, and a call without them then reports, as any study does
(`report.py`), with the compiled peak memory and the time of an update over dense's. Each model is
compared with the dense one of its share, and NGC with the largest. Not for: which models there are
(`protocols.py`), or ablations of one of them.
"""

import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from experiments.blocks import Block, Table, Words
from experiments.overhead import overhead
from experiments.protocols import MODELS, PROTOCOLS, Protocol, sized
from experiments.run import arguments, carry_out
from experiments.stats import ratio
from experiments.study import Results, Study
from experiments.sweeps import Sweep, Variant, seeds
from ngc_jax.commands.arguments import command


def study(protocol: Protocol, chosen: list[str], count: int, path: str = "") -> Study:
    """A protocol's models, each at each share that it wants of them."""
    variants = Sweep(
        Variant(
            {"model": of.model, "share": of.share},
            {**of.fields, "rate": tuple(of.rate * factor for factor in protocol.factors)},
        )
        for of in sized(protocol, chosen, path)
    )

    def costs(configs: Sequence[ConfigDict]) -> list[dict[str, str]]:
        reference = sized(protocol.only_dense, ["dense"], path)[0].config
        return [
            {
                "peak MiB": f"{cost.peak / 2**20:,.0f}",
                "time of an update / dense's": f"{cost.time:.2f}",
            }
            for cost in overhead(reference, configs)
        ]

    return Study(
        sweep=variants * seeds(count),
        config=protocol.config,
        tuning=protocol.tuning,
        baseline={"model": "dense"} if "dense" in chosen else None,  # of the same share
        costs=costs if protocol.measured else None,
        answer=against_all_of_dense if "dense" in chosen else None,
    )


def against_all_of_dense(results: Results) -> list[Block]:
    """NGC, at each share, against the largest dense model."""
    sized = dict(zip((group.name for group in results.groups), results.costs, strict=True))
    dense = [group for group in results.groups if group.labels["model"] == "dense"]
    full = max(dense, key=lambda group: sized[group.name].matrices)
    losses = results.of(full, results.study.outcome)
    rows = []
    for group in (group for group in results.groups if group.labels["model"].startswith("NGC")):
        over = ratio(results.of(group, results.study.outcome), losses)
        rows.append([*group.labels.values(), f"{sized[group.name].matrices:,}", over])
    said = (
        f"NGC's {results.study.outcome} over that of dense with {sized[full.name].matrices:,} parameters in matrices, "
        "paired by seed: mean and 95% interval."
    )
    return (
        [Words(said), Table(["model", "share", "parameters in matrices", "ratio"], rows)]
        if rows
        else []
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--protocol", choices=PROTOCOLS, default="small")
    parser.add_argument("--seeds", type=int, default=3, help="of the final runs")
    parser.add_argument(
        "--models", default="", help="some of the protocol's, with semicolons; default: all"
    )
    parser.add_argument(
        "--path", default="", help="the text, a file or a folder; default: the protocol's own"
    )
    args, changes = parser.parse_known_args()
    protocol = PROTOCOLS[args.protocol]
    chosen = [name.strip() for name in args.models.split(";")] if args.models else list(MODELS)
    unknown = set(chosen) - set(MODELS)
    if unknown:
        parser.error(f"--models: no {sorted(unknown)}; there are: {'; '.join(MODELS)}")
    if protocol.needs_path and not args.path:
        parser.error(
            f"--protocol={args.protocol} wants --path=FILE, the text of tiny Shakespeare, 1,115,394 bytes"
        )
    path = args.path and str(pathlib.Path(args.path).absolute())
    about = f"Is NGC better at the same size, or at the same cost? Protocol {args.protocol}"
    compared = study(protocol, chosen, args.seeds, path)
    carry_out(compared, "compare", f"compare-{args.protocol}", about, args, changes)


if __name__ == "__main__":
    command(main)
