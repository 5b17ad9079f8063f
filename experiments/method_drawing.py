"""What is NGC? One drawing of the method, by one command:

    python -m experiments.method_drawing --out=docs/method.png

For: README.md: a weight from two states, groups with ports, and rounds. Not for: weights of real
rules (`rule_pictures.py`) or measurements.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ngc_jax.commands.arguments import command
from ngc_jax.report.figures import BLUE, GREEN, ORANGE, RED, matplotlib
from ngc_jax.runtime.files import expand

COLOURS = (BLUE, ORANGE, GREEN, RED)  # one a group
INK, SOFT, PALE = "#222222", "#606060", "#f4f5f7"
SIZE = (110, 53)  # of the canvas, in tenths of an inch
Point = tuple[float, float]


class Canvas:
    """Shapes on one pair of axes, in tenths of an inch."""

    def __init__(self) -> None:
        self.library = matplotlib()
        self.figure = self.library.figure.Figure(
            figsize=(SIZE[0] / 10, SIZE[1] / 10), dpi=150, facecolor="white"
        )
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
        self.axes.axis("off")

    def text(self, at: Point, words: str, size: float = 11, **more: Any) -> None:
        style = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.35} | more
        self.axes.text(*at, words, fontsize=size, **style)

    def box(self, at: Point, width: float, height: float, **more: Any) -> None:
        from matplotlib.patches import FancyBboxPatch

        style = {"boxstyle": "round,pad=0,rounding_size=1.2", "facecolor": "white"} | more
        self.axes.add_patch(FancyBboxPatch(at, width, height, **style))

    def neuron(self, at: Point, colour: str, radius: float = 1.0) -> None:
        from matplotlib.patches import Circle

        self.axes.add_patch(
            Circle(at, radius, facecolor=colour, edgecolor="white", linewidth=1, zorder=4)
        )

    def state(self, at: Point, values: Sequence[float], colour: str, cell: float = 1.9) -> None:
        """A row of cells, the stronger the larger a number is, `at` its left end's middle."""
        from matplotlib.patches import Rectangle

        for place, value in enumerate(values):
            corner = (at[0] + place * cell, at[1] - cell / 2)
            for face, alpha, line in (("white", 1, 0), (colour, value, 0), ("none", 1, 0.8)):
                look: dict[str, Any] = {
                    "facecolor": face,
                    "alpha": alpha,
                    "linewidth": line,
                    "edgecolor": INK,
                }
                self.axes.add_patch(Rectangle(corner, cell, cell, zorder=5, **look))

    def arrow(self, start: Point, end: Point, colour: str = INK, **more: Any) -> None:
        from matplotlib.patches import FancyArrowPatch

        style: dict[str, Any] = {"arrowstyle": "-|>", "mutation_scale": 12, "linewidth": 1.4}
        style |= more
        self.axes.add_patch(
            FancyArrowPatch(start, end, color=colour, shrinkA=0, shrinkB=0, **style)
        )

    def panel(self, left: float, width: float, number: int, title: str) -> None:
        self.box((left, 1), width, SIZE[1] - 2, facecolor=PALE, edgecolor="none", zorder=0)
        self.text(
            (left + 1.6, 47.8),
            f"{number}",
            13,
            ha="left",
            va="baseline",
            fontweight="bold",
            color=SOFT,
        )
        self.text((left + 4.2, 47.8), title, 12.5, ha="left", va="baseline", fontweight="bold")


def weight(canvas: Canvas, left: float) -> None:
    """Panel 1: the weight between two neurons comes from their states."""
    canvas.panel(left, 33, 1, "Two states make a weight")
    sender, receiver = (left + 6.5, 36), (left + 26.5, 36)
    canvas.arrow((sender[0] + 2.6, sender[1]), (receiver[0] - 2.6, receiver[1]), linewidth=3)
    canvas.neuron(sender, BLUE, 2)
    canvas.neuron(receiver, ORANGE, 2)
    canvas.text((sender[0], 41.6), "neuron i\nsends")
    canvas.text((receiver[0], 41.6), "neuron j\nreceives")
    canvas.text((left + 16.5, 38.2), "W[j, i]", 12, fontweight="bold")
    for neuron, values, colour, name in (
        (sender, (0.9, 0.25, 0.6), BLUE, "state S[i]"),
        (receiver, (0.35, 0.85, 0.15), ORANGE, "state R[j]"),
    ):
        canvas.state((neuron[0] - 2.85, 30.2), values, colour)
        canvas.text((neuron[0], 27.4), name)
        toward = left + 16.5 + np.sign(neuron[0] - left - 16.5) * 4.6
        canvas.arrow((neuron[0], 25.6), (toward, 21.3), SOFT)
    canvas.box((left + 6.2, 15.8), 20.6, 5.2, edgecolor=INK, linewidth=1)
    canvas.text((left + 16.5, 18.4), "W[j, i] = R[j] · S[i]", 12)
    canvas.text((left + 16.5, 12.9), "(one of eleven rules)", 10.5, color=SOFT)
    canvas.text(
        (left + 16.5, 7.4),
        "stored and trained: the states\ncomputed when needed: the weights",
        10.5,
        color=SOFT,
        va="top",
    )


def groups(canvas: Canvas, left: float) -> None:
    """Panel 2: neurons of a group are connected, groups send each other signals."""
    canvas.panel(left, 37.5, 2, "Ports connect the groups")
    middle = np.array([left + 18.75, 30.5])
    corners = middle + np.array([[-11, 8.2], [11, 8.2], [11, -8.2], [-11, -8.2]])
    for centre, colour in zip(corners, COLOURS, strict=True):
        canvas.box(
            (centre[0] - 5, centre[1] - 5), 10, 10, edgecolor=colour, linewidth=1.6, zorder=2
        )
        angles = np.pi / 2 + 2 * np.pi * np.arange(5) / 5
        members = centre + 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        for one in members:
            for other in members:
                canvas.axes.plot(*zip(one, other, strict=True), color=colour, lw=0.7, zorder=3)
        for one in members:
            canvas.neuron(tuple(one), colour, 1.1)
    for a in range(4):
        for b in range(4):
            if a == b:
                continue
            way = corners[b] - corners[a]
            unit = way / np.linalg.norm(way)
            side = np.array([-unit[1], unit[0]])
            reach = 8.2 if abs(unit).min() > 0.1 else 5.6
            start, end = corners[a] + reach * unit + side, corners[b] - reach * unit + side
            canvas.arrow(tuple(start), tuple(end), COLOURS[a], mutation_scale=9, linewidth=1.1)
    at = corners[0] + (corners[1] - corners[0]) / 2
    canvas.state((at[0] - 1.5, at[1] + 3.4), (0.8, 0.4), BLUE, cell=1.5)
    canvas.text((at[0], at[1] + 6.3), "signal", 10.5, color=BLUE)
    foot = left + 2.2
    canvas.neuron((foot + 1.4, 11.6), BLUE, 1.4)
    for place, colour in enumerate(COLOURS[1:]):
        canvas.state((foot + 4.2 + 5.2 * place, 11.6), (0.85, 0.4), colour, cell=1.9)
    canvas.text((foot + 20.2, 11.6), "a neuron's ports,\n2 numbers each", 10.5, ha="left")
    canvas.text(
        (left + 18.75, 7.4),
        "inside a group: all neurons are connected\nbetween groups: signals of a few numbers",
        10.5,
        color=SOFT,
        va="top",
    )


def rounds(canvas: Canvas, left: float) -> None:
    """Panel 3: the rounds of the loop."""
    canvas.panel(left, 34.5, 3, "Rounds reuse the states")
    column, drive = left + 20, left + 5.5
    heights = (36.2, 27.6, 19)
    canvas.text((column, 44.3), "input e", 11.5)
    canvas.arrow((column, 42.9), (column, 40.2))
    for number, height in enumerate(heights, start=1):
        name = "round R" if number == 3 else f"round {number}"
        canvas.box((column - 9.5, height - 2.2), 19, 6, edgecolor=INK, linewidth=1.2, zorder=2)
        canvas.text((column - 4.6, height + 0.8), name, 11.5, zorder=6)
        for spot, colour in zip(((3, 2), (6.4, 2), (6.4, -0.5), (3, -0.5)), COLOURS, strict=True):
            canvas.neuron((column + spot[0] + 1, height + spot[1] + 0.1), colour, 0.9)
        canvas.arrow((drive, height + 0.8), (column - 9.6, height + 0.8), SOFT)
        if number < 3:
            dotted: dict[str, Any] = {"linestyle": (0, (1, 1.5))} if number == 2 else {}
            canvas.arrow((column, height - 2.3), (column, height - 4.7), **dotted)
    canvas.axes.plot([drive, drive], [heights[2] + 0.8, 44.3], color=SOFT, lw=1.4)
    canvas.axes.plot([drive, column - 4], [44.3, 44.3], color=SOFT, lw=1.4)
    canvas.text((drive - 1.9, 31.5), "drive", 10.5, rotation=90, color=SOFT)
    canvas.arrow((column, heights[2] - 2.3), (column, 13.4))
    canvas.text((column, 12), "output", 11.5)
    canvas.text(
        (left + 17.25, 7.4),
        "each round: groups read signals\nand update; same states in all rounds",
        10.5,
        color=SOFT,
        va="top",
    )


def draw(out: pathlib.Path) -> None:
    """The drawing, as a PNG."""
    canvas = Canvas()
    weight(canvas, 1)
    groups(canvas, 35.5)
    rounds(canvas, 74.5)
    canvas.figure.savefig(out, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=expand, default=pathlib.Path("docs/method.png"))
    args = parser.parse_args()
    draw(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main, goes_on=True)
