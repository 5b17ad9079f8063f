"""The figures of every report: loss during training, outcome against cost, heat map.

For: drawing results, with one colour, mark and line for each group in all figures of a report. Not
for: computing results (`study.py`), or a study's own figures.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.study import LOSS, Group, Results
from ngc_jax.report.blocks import Block
from ngc_jax.report.figures import COLOURS, figure, look

MOST = 12  # curves in one figure
MEANS = "Lines and marks: means over seeds. Bands and bars: from the lowest to the highest seed."


def looks(results: Results) -> dict[str, dict[str, str]]:
    """Colour, mark and line of each group, by its name.

    The first factor sets the colour, the others the mark and the line; beyond ten values of the
    first factor, colours repeat with other marks and lines.
    """
    kinds = results.varied[results.first]
    others = [*dict.fromkeys(group.others for group in results.groups)]
    return {
        group.name: look(
            kinds.index(group.labels[results.first]), others.index(group.others), len(others)
        )
        for group in results.groups
    }


def legend(canvas: Any, axis: Any) -> None:
    """Draws the legend beside the axes, where it covers nothing."""
    canvas.legend(*axis.get_legend_handles_labels(), fontsize=8, loc="outside right upper")


def curves(results: Results) -> Block | None:
    """Held-out loss over updates: mean and range over seeds."""
    lines: dict[str, np.ndarray] = {}  # group -> [seed, evaluation, (update, loss)]
    for group in results.groups:
        found = [results.records[group.run(seed)]["curve"] for seed in results.of(group, LOSS)]
        if found and len(found[0]) > 1 and all(len(run) == len(found[0]) for run in found):
            lines[group.name] = np.array(found)
    if not lines:
        return None
    ranked = sorted(lines, key=lambda name: float(lines[name][:, -1, 1].mean()))
    chosen = np.linspace(0, len(ranked) - 1, min(MOST, len(ranked))).round().astype(int)
    shown, style = [ranked[place] for place in chosen], looks(results)
    titles = {group.name: group.title for group in results.groups}
    late = np.concatenate(
        [lines[name][:, lines[name].shape[1] // 4 :, 1].ravel() for name in shown]
    )

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        for name in shown:
            steps, values = lines[name][0, :, 0], lines[name][:, :, 1]
            axis.plot(steps, values.mean(axis=0), label=titles[name], **style[name])
            ends, colour = (values.min(axis=0), values.max(axis=0)), style[name]["color"]
            axis.fill_between(steps, *ends, alpha=0.2, color=colour, linewidth=0)
        axis.set(xlabel="updates", ylabel=LOSS, ylim=(late.min() * 0.98, late.max() * 1.02))
        legend(canvas, axis)

    caption = (
        f"Loss during training. Vertical axis: {LOSS}; the first quarter of training may lie above "
        f"it. Horizontal axis: updates. {MEANS}"
    )
    if len(shown) < len(ranked):
        caption += (
            f" Shown: {len(shown)} of {len(ranked)} groups, from the lowest loss to the highest."
        )
    return figure("curves", caption, draw)


def pareto(results: Results) -> Block | None:
    """The outcome against parameters and FLOPs, where these differ by more than matching leaves."""
    points: list[tuple[Group, dict[str, int], list[float]]] = []  # group, costs, values
    for group, cost in zip(results.groups, results.costs, strict=True):
        values = [*results.of(group, results.study.outcome).values()]
        if values and all(map(math.isfinite, values)):
            costs = {"parameters in matrices": cost.matrices, "FLOPs per token": cost.flops}
            points.append((group, costs, values))
    names = points[0][1] if points else ()
    along = [name for name in names if apart([costs[name] for _, costs, _ in points], 1.05)]
    if not along:
        return None
    style, kinds = looks(results), results.varied[results.first]

    def draw_kind(axis: Any, kind: str, name: str) -> None:
        of = [point for point in points if point[0].labels[results.first] == kind]
        of.sort(key=lambda point: point[1][name])
        x, means = [costs[name] for _, costs, _ in of], [statistics.mean(v) for _, _, v in of]
        if len(x) > 1 and all(apart(pair, 1.02) for pair in itertools.pairwise(x)):
            axis.plot(x, means, color=look(kinds.index(kind))["color"], linewidth=1)
        for (group, _, values), at, mean in zip(of, x, means, strict=True):
            axis.plot(at, mean, **style[group.name])
            axis.vlines(at, min(values), max(values), color=style[group.name]["color"], linewidth=1)

    def draw(canvas: Any) -> None:
        axes = canvas.subplots(len(along), 1, squeeze=False)[:, 0]
        for axis, name in zip(axes, along, strict=True):
            for kind in kinds:
                draw_kind(axis, kind, name)
            _scale(axis, [costs[name] for _, costs, _ in points])
            axis.set(xlabel=name, ylabel=results.study.outcome)
        name_looks(axes[0], results, [group for group, _, _ in points])
        legend(canvas, axes[0])

    outcome = results.study.outcome
    where = [f"{name} ({place})" for name, place in zip(along, ("above", "below"), strict=False)]
    axis = f"axes: {', '.join(where)}" if len(along) > 1 else f"axis: {along[0]}"
    of = results.study.legend.get(outcome, "")  # what an outcome of the study's own means
    what = f"{outcome} ({of})" if of else outcome
    caption = f"{_begun(outcome)} against cost. Vertical axis: {what}. Horizontal {axis}. {MEANS}"
    return figure("pareto", caption, draw, height=3.5 * len(along))


def _scale(axis: Any, costs: Sequence[float]) -> None:
    """A linear or logarithmic horizontal axis with few, plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    wide = apart(costs, 10)
    axis.set_xscale("log" if wide else "linear")
    ticks = LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])
    axis.xaxis.set_major_locator(ticks)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("")


def name_looks(axis: Any, results: Results, groups: Sequence[Group]) -> None:
    """Adds entries to the legend: for each value of the factors, or for each group."""
    style = looks(results)
    kinds = {group.labels[results.first]: style[group.name] for group in reversed(groups)}
    others = {group.others: style[group.name] for group in reversed(groups)}
    if len(others) == 1 or len(results.varied[results.first]) > len(COLOURS):
        for group in groups:
            axis.plot([], [], label=group.title, **style[group.name])
        return
    for kind in (kind for kind in results.varied[results.first] if kind in kinds):
        axis.plot([], [], label=kind, color=kinds[kind]["color"])
    factor = [*results.varied][1]
    for other in reversed(others):
        label = other if factor in other else f"{factor} {other}"
        axis.plot([], [], label=label, color="0.3", marker=others[other]["marker"], linestyle="")


def apart(values: Sequence[float], factor: float) -> bool:
    """Whether the largest of these positive values is more than `factor` times the smallest."""
    return max(values) > factor * min(values)


def heat_map(results: Results) -> Block | None:
    """The outcome over two factors, where two have three values or more."""
    large = [factor for factor, labels in results.varied.items() if len(labels) > 2]
    if len(large) != 2:
        return None
    down, along = (results.varied[factor] for factor in large)
    cells = np.full((len(down), len(along)), np.nan)
    for (i, j), _ in np.ndenumerate(cells):
        here = {large[0]: down[i], large[1]: along[j]}
        of = [group for group in results.groups if here.items() <= group.labels.items()]
        values = [
            value for group in of for value in results.of(group, results.study.outcome).values()
        ]
        cells[i, j] = statistics.mean(values) if values else math.nan

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        map_ = axis.imshow(cells, cmap="Blues", aspect="auto")
        middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
        # a comparison does not have every model at every size
        for i, j in np.argwhere(np.isfinite(cells)):
            colour = "white" if cells[i, j] > middle else "black"
            axis.text(j, i, f"{cells[i, j]:.3f}", ha="center", va="center", color=colour)
        axis.set_xticks(range(len(along)), along)
        axis.set_yticks(range(len(down)), down)
        axis.set(xlabel=large[1], ylabel=large[0])
        canvas.colorbar(map_, label=results.study.outcome)

    caption = (
        f"{_begun(results.study.outcome)}: means over seeds and all other factors, as numbers and "
        f"colours. Rows: {large[0]}. Columns: {large[1]}. An empty cell has no runs."
    )
    return figure("heat_map", caption, draw, height=1.4 + 0.45 * len(down))


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]
