"""README's table of the models, from the committed results of the comparison.

    python -m experiments.readme

For: the columns a first reader wants, the largest share first and the better before the worse. Not
for: what they hold, which the report says (`compare.py`); nothing is computed here.
"""

import itertools
import pathlib

from experiments.blocks import Table
from experiments.study import LOSS

ROOT = pathlib.Path(__file__).parent.parent
README, REPORT = ROOT / "README.md", ROOT / "experiments" / "results" / "small" / "report.md"
BEGIN, END = "<!-- made by: python -m experiments.readme -->\n", "<!-- end -->"
COLUMNS = {  # of the report: as README calls them
    "model": "model",
    "share": "share",
    "parameters in matrices": "parameters in matrices",
    "all parameters": "all parameters",
    LOSS: "loss (nats per byte)",
    "difference": "from dense's of that share",
    "time of an update / dense's": "time of an update",
}


def table(report: str) -> str:
    """The table of results in a report, as README shows it, in Markdown."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if LOSS in cells(line))
    found = [
        cells(line)
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    ]
    rows = [dict(zip(found[0], values, strict=True)) for values in found[2:]]
    shown = [row for row in rows if row[LOSS] != "-"]
    shown.sort(key=lambda row: (row["share"], -float(row[LOSS].split()[0])), reverse=True)
    return Table([*COLUMNS.values()], [[row[name] for name in COLUMNS] for row in shown]).markdown()


def cells(line: str) -> list[str]:
    """What stands between the bars of a table's line."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def renewed(readme: str, report: str) -> str:
    """README with its table made anew."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(report)}\n\n{END}{after}"


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(), REPORT.read_text()))
