"""The report of a study: one self-contained HTML page, and the same as Markdown.

    python -m experiments.report STUDY [--workdir=DIR]

For: DIR/report.html, DIR/report.md, the figures as PNG, and DIR/rows.csv with a row for each run.
`experiments.run` calls it at its end. It reads the records of the runs, so the report does not
depend on how often runs were killed. Not for: running, figures (`figures.py`), or a study's own
blocks (its `answer`).
"""

import argparse
import csv
import io
import math
import pathlib
import re
from typing import Any

from experiments import figures
from experiments.stats import adjusted, interval, p_value, paired
from experiments.study import LOSS, Group, Results, find, groups, prepared, read_records
from experiments.sweeps import SEED
from ngc_jax.commands.arguments import command
from ngc_jax.report import page
from ngc_jax.report.blocks import Block, heading, listing, paragraph, table
from ngc_jax.runtime.files import ROOT, expand
from ngc_jax.runtime.output import doing

RATE = "learning rate"
LEGEND = {
    "seeds": "number of seeds with a result",
    "parameters in matrices": "weights, neuron states and maps of linear layers, without "
    "embeddings and norm scales",
    "all parameters": "with embeddings and norm scales",
    "FLOPs per token": "of the matrix products of a forward pass, 2 for each multiply-add",
    RATE: "the best of those tried, by the loss of shorter runs",
}


def blocks(results: Results) -> list[Block]:
    """All blocks of a report, in order."""
    study = results.study
    drawn = [figures.curves(results), figures.pareto(results), figures.heat_map(results)]
    return [
        heading("Setting"),
        table(["factor", "values"], [[name, "; ".join(of)] for name, of in results.varied.items()]),
        table(["field of all runs", "value"], setting(results)),
        heading("Results"),
        paragraph("Means over seeds, with 95% intervals (Student's t)."),
        *outcomes(results),
        *(study.answer(results) if study.answer else ()),
        *(block for block in drawn if block),
        *failures(results),
        heading("Provenance"),
        *provenance(results),
    ]


def setting(results: Results) -> list[list[str]]:
    """Rows of fields and values that all runs share."""
    study = results.study
    fields = {"config": study.config, **study.common, **study.changes}
    seeds = max(len(group.seeds) for group in results.groups)
    rows = [[f"`{name}`", anywhere(str(value), results.home)] for name, value in fields.items()]
    return [*rows, ["number of seeds", str(seeds)]]


def outcomes(results: Results) -> list[Block]:
    """A row for each group: measures, differences from the baseline, costs; then a legend.

    Groups with other measures have a table of their own.
    """
    study = results.study
    compared = {}
    for group in results.groups:
        other = results.baseline(group)
        if other and study.baseline:
            values = results.of(group, study.outcome)
            compared[group.name] = paired(values, results.of(other, study.outcome))
    chances = adjusted({name: result.p for name, result in compared.items()})
    tried = any(len(group.rates) > 1 for group in results.groups)
    empty: list[dict[str, str]] = [{} for _ in results.groups]
    more = study.costs([cost.config for cost in results.costs]) if study.costs else empty
    tables: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for group, cost, columns in zip(results.groups, results.costs, more, strict=True):
        names = results.measures(group)
        row = {name: interval([*results.of(group, name).values()], 4) for name in names}
        if study.baseline:
            row["difference"] = str(compared.get(group.name, ""))
            row["p"] = p_value(chances.get(group.name, math.nan))
        row["seeds"] = str(len(results.of(group, study.outcome)))
        row["parameters in matrices"] = f"{cost.matrices:,}"
        row |= {"all parameters": f"{cost.parameters:,}", "FLOPs per token": f"{cost.flops:,}"}
        row |= columns | ({RATE: chosen(results, group)} if tried else {})
        tables.setdefault(tuple(names), []).append({**group.labels, **row})
    made = [table([*rows[0]], [[*row.values()] for row in rows]) for rows in tables.values()]
    known = {**LEGEND, **compare(results), **study.legend}
    heads = dict.fromkeys(head for rows in tables.values() for head in rows[0])
    return [*made, table(["column", "meaning"], [[h, known[h]] for h in heads if h in known])]


def compare(results: Results) -> dict[str, str]:
    """Meanings of the columns that compare groups."""
    study = results.study
    baseline = ", ".join((study.baseline or {}).values())
    return {
        "difference": f"{study.outcome}, minus that of the group with {baseline}; paired by seed",
        "p": "of the paired t test, after Holm's correction for all comparisons; below 0.05 the "
        "difference is significant",
    }


def chosen(results: Results, group: Group) -> str:
    """The learning rate of a group's runs."""
    fields = [results.records[group.run(seed)]["fields"] for seed in results.of(group, LOSS)]
    rate = fields[0].get("train.learning_rate") if fields else None
    return "" if rate is None else f"{rate:g}"


def failures(results: Results) -> list[Block]:
    """Runs that failed, diverged or are missing, if any."""
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
    return [heading("Runs without a result"), table(["run", "status"], rows)] if rows else []


def provenance(results: Results) -> list[Block]:
    """Commits, versions, data and commands, and the runs that each belongs to."""

    def said(value: Any) -> str:
        return value if isinstance(value, str) else ", ".join(" ".join(of) for of in value.items())

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
    return [table(["what", "value", "runs"], lines), listing(commands, "Commands")]


def anywhere(line: str, home: pathlib.Path) -> str:
    """A line without the paths of this machine."""
    return line.replace(str(home), "DIR").replace(str(ROOT), ".")


def rows(results: Results) -> str:
    """CSV with a row for each run: its factors, seed, learning rate, measures and error."""
    records = results.records
    by_run = {group.run(seed): group for group in results.groups for seed in group.seeds}
    by_name = {group.name: group for group in results.groups}
    named = dict.fromkeys(name for record in records.values() for name in record["measures"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *results.varied, SEED, RATE, *named, "error"])
    for name, record in records.items():
        fields, measures = record["fields"], record["measures"]
        rate = fields.get("train.learning_rate", "")
        trial = re.fullmatch(r"tune-(.*?)-[\d.]+(e-?\d+)?", name)  # a run that tries a rate
        group = by_name.get(trial[1]) if trial else by_run.get(name)
        labels = group.labels if group else {}
        values = (measures.get(measure, "") for measure in named)
        known = [labels.get(factor, "") for factor in results.varied]
        writer.writerow([name, *known, fields.get(SEED, ""), rate, *values, record["error"]])
    return out.getvalue()


def introduction(text: str) -> list[Block]:
    """The paragraphs of a docstring; indented ones are listings."""
    return [
        listing([line.strip() for line in part.splitlines()])
        if part.startswith("    ")
        else paragraph(" ".join(part.split()))
        for part in text.strip("\n").split("\n\n")
        if part.strip()
    ]


def report(results: Results, about: str) -> pathlib.Path:
    """Write report.md, report.html, figures and rows.csv into the study's folder.

    about: the study's docstring, whose first line is the title. Returns the path of the page.
    """
    title, _, rest = about.strip().partition("\n")
    with doing("drawing the report"):
        page.write(results.home, "report", title, [*introduction(rest), *blocks(results)])
    (results.home / "rows.csv").write_text(rows(results), encoding="utf-8")
    return results.home / "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", help="name of a file of experiments/, or path of your file")
    parser.add_argument("--workdir", type=expand, help="default: runs/STUDY")
    args = parser.parse_args()
    name, study, about = find(args.study)
    home = (args.workdir or pathlib.Path("runs") / name).absolute()
    study = prepared(study, home)
    print(report(Results(study, home, groups(study), read_records(home)), about))


if __name__ == "__main__":
    command(main)
