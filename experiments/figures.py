"""The figures that every report has, where what was varied allows them.

For: drawing results. Not for: which numbers there are (`study.py`), or a study's own figures.
"""

import io
import math
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.blocks import Picture
from experiments.study import Results
from ngc_jax.metrics import read_rows

MOST = 12  # groups that one figure can show


def picture(name: str, caption: str, draw: Callable[[Any], None], width: float = 7.0, height: float = 4.0) -> Picture:
    """What draw(canvas) draws, the same bytes each time; width and height in inches."""
    from matplotlib.figure import Figure

    canvas, out = Figure(figsize=(width, height), dpi=130, layout="constrained"), io.BytesIO()
    draw(canvas)
    canvas.savefig(out, format="png", metadata={"Software": None})
    return Picture(name, out.getvalue(), caption)


def legend(canvas: Any, axis: Any) -> None:
    """Beside the axes, so that it covers nothing."""
    canvas.legend(*axis.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right upper")


def curves(results: Results) -> Picture | None:
    """Held-out loss over updates, mean and range over seeds."""
    lines: dict[str, np.ndarray] = {}  # group -> [seed, evaluation, (update, loss)]
    for group in results.groups:
        found = [
            [(row["step"], row["eval/loss"]) for row in read_rows(home) if row.get("eval/loss")]
            for home in results.workdirs(group).values()
        ]
        if found and len(found[0]) > 1 and all(len(run) == len(found[0]) for run in found):
            lines[group.name] = np.array(found)
    if not lines:
        return None
    ranked = sorted(lines, key=lambda name: float(lines[name][:, -1, 1].mean()))
    places = range(len(ranked)) if len(ranked) <= MOST else np.linspace(0, len(ranked) - 1, MOST).round().astype(int)
    shown = [ranked[place] for place in places]

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        for name in shown:
            steps, values = lines[name][0, :, 0], lines[name][:, :, 1]
            axis.plot(steps, values.mean(axis=0), label=name, linewidth=1.2)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2)
        late = np.concatenate([lines[name][:, lines[name].shape[1] // 4 :, 1].ravel() for name in shown])
        axis.set(xlabel="updates", ylabel="held-out loss (nats per token)", ylim=(late.min() * 0.98, late.max() * 1.02))
        legend(canvas, axis)

    of = "" if len(shown) == len(ranked) else f" {len(shown)} of {len(ranked)} groups, from the best to the worst."
    return picture("curves", f"Held-out loss during training: mean, and the range over seeds.{of}", draw)


def pareto(results: Results) -> Picture | None:
    """The outcome against parameters and FLOPs, where these vary."""
    points = []
    for group, cost in zip(results.groups, results.costs, strict=True):
        values = [*results.of(group, results.study.outcome).values()]
        if values and all(map(math.isfinite, values)):
            bar = (max(values) - min(values)) / 2
            points.append((group, cost.matrices, cost.flops, statistics.mean(values), bar))
    if len({point[1:3] for point in points}) < 2:
        return None
    first = next(iter(results.groups[0].labels))

    def draw(canvas: Any) -> None:
        axes = canvas.subplots(2, 1)
        for axis, cost, label in zip(axes, (1, 2), ("parameters in matrices", "FLOPs per token"), strict=True):
            for model in dict.fromkeys(point[0].labels[first] for point in points):
                of = sorted((p[cost], p[3], p[4]) for p in points if p[0].labels[first] == model)
                x, y, bars = zip(*of, strict=True)
                axis.errorbar(x, y, bars, fmt="o-", markersize=4, linewidth=1, label=model)
            axis.set(xscale="log", xlabel=label, ylabel=results.study.outcome)
        legend(canvas, axes[0])

    caption = f"{_begun(results.study.outcome)} against cost: means, and the range over seeds."
    return picture("pareto", caption, draw, height=7.0)


def heat_map(results: Results) -> Picture | None:
    """The outcome over two factors, where two have three values or more."""
    large = [factor for factor, labels in results.varied.items() if len(labels) > 2]
    if len(large) != 2:
        return None
    down, along = (results.varied[factor] for factor in large)
    cells = np.full((len(down), len(along)), np.nan)
    for (i, j), _ in np.ndenumerate(cells):
        here = {large[0]: down[i], large[1]: along[j]}
        of = [group for group in results.groups if here.items() <= group.labels.items()]
        values = [value for group in of for value in results.of(group, results.study.outcome).values()]
        cells[i, j] = statistics.mean(values) if values else math.nan

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        image = axis.imshow(cells, cmap="Blues", aspect="auto")
        middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
        for i, j in np.argwhere(np.isfinite(cells)):  # a comparison has not each model at each share
            colour = "white" if cells[i, j] > middle else "black"
            axis.text(j, i, f"{cells[i, j]:.3f}", ha="center", va="center", fontsize=8, color=colour)
        axis.set_xticks(range(len(along)), along)
        axis.set_yticks(range(len(down)), down)
        canvas.colorbar(image, label=results.study.outcome)

    caption = f"{_begun(results.study.outcome)}, means: {large[0]} by {large[1]}."
    return picture("heat_map", caption, draw, height=1.2 + 0.5 * len(down))


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]
