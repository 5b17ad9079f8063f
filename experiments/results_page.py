"""The table and the picture of docs/results.md, from the committed report of the comparison.

    python -m experiments.results_page

For: the columns that a first reader needs, the largest size first and the best model first. Not
for: the numbers themselves, which `compare.py` computes: this file only reads them.
"""

import argparse
import itertools
import pathlib
from typing import Any

from experiments.study import LOSS
from ngc_jax.report.blocks import table as block
from ngc_jax.report.figures import BLACK, BLUE, GREY, figure

ROOT = pathlib.Path(__file__).parent.parent
PAGE, PICTURE = ROOT / "docs" / "results.md", ROOT / "docs" / "results.png"
REPORT = ROOT / "experiments" / "results" / "small" / "report.md"
BEGIN, END = "<!-- made by: python -m experiments.results_page -->\n", "<!-- end -->"
COLUMNS = {  # of the report: as the page calls them
    "model": "model",
    "size": "size",
    "parameters in matrices": "parameters in matrices",
    "all parameters": "all parameters",
    LOSS: "loss (nats per byte)",
    "difference": "difference from dense of the same size",
    "update time (dense_small = 1)": "time of an update (dense_small = 1)",
}
COLOURS = {"NGC": BLUE, "NGC unlooped": BLUE, "dense": BLACK}


def rows(report: str) -> list[dict[str, str]]:
    """The rows of a report's table of results, the largest size first and the lowest loss first."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if LOSS in cells(line))
    found = [
        cells(line)
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    ]
    every = [dict(zip(found[0], values, strict=True)) for values in found[2:]]
    done = [row for row in every if row[LOSS] != "-"]
    return sorted(done, key=lambda row: (row["size"], -number(row[LOSS])[0]), reverse=True)


def table(report: str) -> str:
    """The table of the page, in Markdown."""
    named = [row | {"size": size(row["size"])} for row in rows(report)]
    return block([*COLUMNS.values()], [[row[name] for name in COLUMNS] for row in named]).markdown


def drawing(report: str) -> bytes:
    """The loss of each model with its interval, one panel a size, as a PNG."""
    sizes = {
        share: [*group] for share, group in itertools.groupby(rows(report), lambda r: r["size"])
    }
    full = number(next(row[LOSS] for row in sizes["1:flops"] if row["model"] == "dense"))[0]

    def draw(canvas: Any) -> None:
        panels = canvas.subplots(
            len(sizes), 1, sharex=True, height_ratios=[len(group) + 0.6 for group in sizes.values()]
        )
        for panel, (share, group) in zip(panels, sizes.items(), strict=True):
            for place, row in enumerate(reversed(group)):
                loss, interval = number(row[LOSS])
                colour = COLOURS.get(row["model"], GREY)
                panel.errorbar(loss, place, xerr=interval, fmt="o", color=colour, capsize=3)
            panel.axvline(full, color="0.6", linestyle=":", linewidth=1)
            panel.set(yticks=range(len(group)), ylim=(-0.8, len(group) - 0.2))
            panel.set_yticklabels([row["model"] for row in reversed(group)])
            panel.set_title(size(share), loc="left", fontsize=10, fontweight="bold")
            panel.grid(axis="x", alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xlabel("held-out loss (nats per byte): mean and 95% interval of three seeds")

    return figure("results", "", draw, height=7.6).files["results.png"]


def size(share: str) -> str:
    """What a model's size was matched to, in words."""
    if share.endswith(":flops"):
        return "equal FLOPs"
    return f"{100 * float(share):.0f}% of the parameters"


def number(text: str) -> tuple[float, float]:
    """Mean and half of the interval of "1.3901 ± 0.0140"."""
    mean, interval = text.split(" ± ")
    return float(mean), float(interval)


def cells(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell.strip() for cell in line.split("|")[1:-1]]


def renewed(page: str, report: str) -> str:
    """The page with its table made again."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(report)}\n\n{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    PAGE.write_text(renewed(PAGE.read_text("utf-8"), REPORT.read_text("utf-8")), "utf-8")
    PICTURE.write_bytes(drawing(REPORT.read_text("utf-8")))
