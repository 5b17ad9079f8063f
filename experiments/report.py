"""The report of a study: one page that opens anywhere, and the same as Markdown.

    python -m experiments.report STUDY [--workdir=DIR]

`experiments.run` makes it too, when all is done. Writes DIR/report.html (which needs nothing but
itself), DIR/report.md, its figures as PNG, and DIR/rows.csv. Made from the records that
`experiments.run` keeps, and so the same, byte for byte, however often runs were killed. Not for:
running, drawing (`figures.py`), or what a study has to say of its own (its `answer`).
"""

import argparse
import csv
import io
import math
import pathlib
from typing import Any

from experiments import figures
from experiments.blocks import Block, Heading, Listing, Table, Words, write
from experiments.stats import adjusted, interval, paired
from experiments.study import LOSS, Group, Results, find, groups, prepared, read_records
from ngc_jax.commands.arguments import command


def blocks(results: Results) -> list[Block]:
    """All that a report holds, in order."""
    study = results.study
    fields = ", ".join(
        f"{name}={value}" for name, value in {**study.common, **study.changes}.items()
    )
    seeds = max(len(group.seeds) for group in results.groups)
    means = "Means over seeds, with 95% intervals (Student's t)."
    if study.baseline:
        means += (
            f" Difference: of the {study.outcome} from that of {' and '.join(study.baseline.values())}, paired by "
            "seed; p: of the paired t test, corrected for the number of comparisons by Holm's method."
        )
    drawn = [figures.curves(results), figures.pareto(results), figures.heat_map(results)]
    return [
        Heading("What was varied"),
        Table(
            ["factor", "values"],
            [[factor, "; ".join(labels)] for factor, labels in results.varied.items()],
        ),
        Words(
            anywhere(
                f"Config {study.config}{f' with {fields}' if fields else ''}; seeds: {seeds}.",
                results.home,
            )
        ),
        Heading("What came of it"),
        Words(means),
        *outcomes(results),
        *(study.answer(results) if study.answer else ()),
        *(picture for picture in drawn if picture),
        *failures(results),
        Heading("What it was made with"),
        *provenance(results),
    ]


def outcomes(results: Results) -> list[Table]:
    """A row for each group: its measures, how they differ from the baseline's, what it costs.

    Groups of which other things were measured stand in a table of their own.
    """
    study = results.study
    compared = {}
    for group in results.groups:
        other = results.baseline(group)
        if other and study.baseline:
            compared[group.name] = paired(
                results.of(group, study.outcome), results.of(other, study.outcome)
            )
    chances = adjusted({name: result.p for name, result in compared.items()})
    tried = any(len(group.rates) > 1 for group in results.groups)
    more = (
        study.costs([cost.config for cost in results.costs])
        if study.costs
        else [{} for _ in results.groups]
    )
    tables: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for group, cost, columns in zip(results.groups, results.costs, more, strict=True):
        names = results.measures(group)
        row = {
            **group.labels,
            **{name: interval([*results.of(group, name).values()], 4) for name in names},
        }
        if study.baseline:
            result = compared.get(group.name)
            known = result is not None and math.isfinite(result.p)
            row |= {
                "difference": str(result or ""),
                "p": f"{chances[group.name]:.3f}" if known else "",
            }
        row |= {
            "seeds": str(len(results.of(group, study.outcome))),
            "parameters in matrices": f"{cost.matrices:,}",
        }
        row |= {
            "all parameters": f"{cost.parameters:,}",
            "FLOPs per token": f"{cost.flops:,}",
            **columns,
        }
        tables.setdefault(tuple(names), []).append(
            row | ({"learning rate": chosen(results, group)} if tried else {})
        )
    return [Table([*rows[0]], [[*row.values()] for row in rows]) for rows in tables.values()]


def chosen(results: Results, group: Group) -> str:
    """The learning rate that a group was trained with."""
    fields = [results.records[group.run(seed)]["fields"] for seed in results.of(group, LOSS)]
    return (
        f"{fields[0]['train.learning_rate']:g}"
        if fields and "train.learning_rate" in fields[0]
        else ""
    )


def failures(results: Results) -> list[Block]:
    """Runs that failed, diverged or are missing: none is dropped in silence."""
    wanted = [group.run(seed) for group in results.groups for seed in group.seeds]
    rows = []
    for name in dict.fromkeys([*wanted, *results.records]):
        record = results.records.get(name)
        if not record:
            rows.append([name, "not run yet"])
        elif record["error"]:
            rows.append([name, record["error"]])
        elif not math.isfinite(record["measures"][LOSS]):
            rows.append([name, "diverged"])
    return (
        [Heading("Runs without a result"), Table(["run", "what became of it"], rows)]
        if rows
        else []
    )


def provenance(results: Results) -> list[Block]:
    """What each run was made with; "all" where that is one thing, "all others" beside a thing of
    fewer runs.
    """

    def said(value: Any) -> str:
        return (
            value
            if isinstance(value, str)
            else ", ".join(f"{name} {version}" for name, version in value.items())
        )

    lines = []
    for what in ("commit", "versions", "data"):
        runs: dict[str, list[str]] = {}
        for name, record in results.records.items():
            runs.setdefault(said(record[what]) or "unknown", []).append(name)
        most = max(runs, key=lambda value: len(runs[value]), default="")
        rest = "all" if len(runs) == 1 else "all others"
        lines += [
            [what, value, rest if value == most else ", ".join(of)] for value, of in runs.items()
        ]
    commands = [anywhere(record["command"], results.home) for record in results.records.values()]
    return [Table(["", "", "runs"], lines), Listing("Commands", commands)]


def anywhere(line: str, home: pathlib.Path) -> str:
    """A line without the paths of this machine, which nobody else has."""
    return line.replace(str(home), "DIR").replace(str(pathlib.Path(__file__).parent.parent), ".")


def rows(results: Results) -> str:
    """Every run's measures, as CSV."""
    named = list(
        dict.fromkeys(name for record in results.records.values() for name in record["measures"])
    )
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow(["run", *named, "error"])
    for name, record in results.records.items():
        table.writerow(
            [name, *(record["measures"].get(measure, "") for measure in named), record["error"]]
        )
    return out.getvalue()


def report(results: Results, about: str) -> pathlib.Path:
    """Write report.md, report.html, figures and rows.csv into the study's folder; `about`: the
    study's docstring.

    Returns the path of the page.
    """
    title, _, rest = about.strip().partition("\n")
    said = [Words(paragraph) for paragraph in rest.strip().split("\n\n") if paragraph]
    write(results.home, "report", title, [*said, *blocks(results)])
    (results.home / "rows.csv").write_text(rows(results))
    return results.home / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", help="a file of experiments/ by name, or a file.py of yours")
    parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/STUDY")
    args = parser.parse_args()
    name, study, about = find(args.study)
    home = (args.workdir or pathlib.Path("runs") / name).absolute()
    study = prepared(study, home)
    print(report(Results(study, home, groups(study), read_records(home)), about))


if __name__ == "__main__":
    command(main)
