"""The figures that every report has, where what was varied allows them.

For: drawing results. Not for: which numbers there are (`study.py`), or a study's own figures.
"""

import io
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from experiments.blocks import Picture
from experiments.study import LOSS, Results

MOST = 12  # groups that one figure can show


def picture(
    name: str, caption: str, draw: Callable[[Any], None], width: float = 7.0, height: float = 4.0
) -> Picture:
    """What draw(canvas) draws, the same bytes each time; width and height in inches."""
    from matplotlib.figure import Figure

    canvas, out = Figure(figsize=(width, height), dpi=130, layout="constrained"), io.BytesIO()
    draw(canvas)
    canvas.savefig(out, format="png", metadata={"Software": None})
    return Picture(name, out.getvalue(), caption)


def legend(canvas: Any, axis: Any) -> None:
    """Beside the axes, so that it covers nothing."""
    canvas.legend(
        *axis.get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right upper"
    )


def curves(results: Results) -> Picture | None:
    """Held-out loss over updates, mean and range over seeds."""
    lines: dict[str, np.ndarray] = {}  # group -> [seed, evaluation, (update, loss)]
    for group in results.groups:
        found = [results.records[group.run(seed)]["curve"] for seed in results.of(group, LOSS)]
        if found and len(found[0]) > 1 and all(len(run) == len(found[0]) for run in found):
            lines[group.name] = np.array(found)
    if not lines:
        return None
    ranked = sorted(lines, key=lambda name: float(lines[name][:, -1, 1].mean()))
    places = (
        range(len(ranked))
        if len(ranked) <= MOST
        else np.linspace(0, len(ranked) - 1, MOST).round().astype(int)
    )
    shown = [ranked[place] for place in places]
    order = [group.name for group in results.groups]

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        for name in shown:
            steps, values, style = (
                lines[name][0, :, 0],
                lines[name][:, :, 1],
                look(order.index(name)),
            )
            axis.plot(
                steps, values.mean(axis=0), label=name, linewidth=1.2, **{**style, "marker": ""}
            )
            axis.fill_between(
                steps, values.min(axis=0), values.max(axis=0), alpha=0.2, color=style["color"]
            )
        late = np.concatenate(
            [lines[name][:, lines[name].shape[1] // 4 :, 1].ravel() for name in shown]
        )
        axis.set(
            xlabel="updates",
            ylabel="held-out loss (nats per token)",
            ylim=(late.min() * 0.98, late.max() * 1.02),
        )
        legend(canvas, axis)

    of = (
        ""
        if len(shown) == len(ranked)
        else f" {len(shown)} of {len(ranked)} groups, from the best to the worst."
    )
    return picture(
        "curves", f"Held-out loss during training: mean, and the range over seeds.{of}", draw
    )


def pareto(results: Results) -> Picture | None:
    """The outcome against parameters and FLOPs, where these vary: by more than is left when sizes
    are matched.
    """
    # kind, costs, mean and half the range
    points: list[tuple[str, dict[str, int], float, float]] = []
    first = next(iter(results.groups[0].labels))
    for group, cost in zip(results.groups, results.costs, strict=True):
        values = [*results.of(group, results.study.outcome).values()]
        if values and all(map(math.isfinite, values)):
            costs = {"parameters in matrices": cost.matrices, "FLOPs per token": cost.flops}
            bar = (max(values) - min(values)) / 2
            points.append((group.labels[first], costs, statistics.mean(values), bar))
    along = (
        [label for label in points[0][1] if apart([point[1][label] for point in points], 1.05)]
        if points
        else []
    )
    if not along:
        return None
    kinds = results.varied[first]

    def draw(canvas: Any) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator

        axes = canvas.subplots(len(along), 1, squeeze=False)[:, 0]
        for axis, label in zip(axes, along, strict=True):
            for place, kind in enumerate(kinds):
                of = sorted(
                    (costs[label], mean, bar) for its, costs, mean, bar in points if its == kind
                )
                if of:
                    x, y, bars = zip(*of, strict=True)
                    line = "-" if all(apart(pair, 1.02) for pair in itertools.pairwise(x)) else ""
                    style = {**look(place), "linestyle": line, "linewidth": 1, "markersize": 4}
                    axis.errorbar(x, y, bars, label=kind, **style)
            wide = apart([point[1][label] for point in points], 10)
            axis.set(xscale="log" if wide else "linear", xlabel=label, ylabel=results.study.outcome)
            ticks = LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
            axis.xaxis.set_major_locator(ticks)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.xaxis.set_minor_formatter("")
        legend(canvas, axes[0])

    caption = f"{_begun(results.study.outcome)} against cost: means, and the range over seeds."
    return picture("pareto", caption, draw, height=3.5 * len(along))


def apart(values: Sequence[float], factor: float) -> bool:
    """Whether the largest of these, all above 0, is more than `factor` times the smallest."""
    return max(values) > factor * min(values)


def look(place: int) -> dict[str, Any]:
    """Colour, line and marker of the so many-th of up to 20 kinds that one figure tells apart."""
    again = place // 10 % 2
    return {"color": f"C{place % 10}", "linestyle": ("-", "--")[again], "marker": "os"[again]}


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
        values = [
            value for group in of for value in results.of(group, results.study.outcome).values()
        ]
        cells[i, j] = statistics.mean(values) if values else math.nan

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        image = axis.imshow(cells, cmap="Blues", aspect="auto")
        middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
        # a comparison has not each model at each share
        for i, j in np.argwhere(np.isfinite(cells)):
            colour = "white" if cells[i, j] > middle else "black"
            axis.text(
                j, i, f"{cells[i, j]:.3f}", ha="center", va="center", fontsize=8, color=colour
            )
        axis.set_xticks(range(len(along)), along)
        axis.set_yticks(range(len(down)), down)
        canvas.colorbar(image, label=results.study.outcome)

    caption = f"{_begun(results.study.outcome)}, means: {large[0]} by {large[1]}."
    return picture("heat_map", caption, draw, height=1.2 + 0.5 * len(down))


def _begun(text: str) -> str:
    return text[:1].upper() + text[1:]
