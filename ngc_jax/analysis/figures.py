"""The pictures of the stability page: each a function from measures to a PNG.

For: drawing what `measures.py` found, in colours that the colour-blind tell apart (Okabe and Ito)
and at a width that a phone shows. Not for: measuring, or captions (`page.py`).
"""

import io
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from ngc_jax.analysis.stability import Loop, Measured, interval
from ngc_jax.runtime.errors import UserError

BLACK, ORANGE, SKY, GREEN, BLUE, RED = (
    "#000000",
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#0072b2",
    "#d55e00",
)
MARKS = list(zip((BLACK, ORANGE, SKY, GREEN, BLUE, RED), "osD^vP", strict=True))
WIDTH = 6.4  # inches
Draw = Callable[[Any, Measured], None]


def matplotlib() -> ModuleType:
    """The library that draws. Raises UserError where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError(
            "the page's figures need matplotlib: pip install 'ngc_jax[plot]'"
        ) from error
    return matplotlib


def png(draw: Draw, measured: Measured, height: float) -> bytes:
    """What `draw` draws on a figure of `height` inches, as a PNG on white: it stays readable on a
    dark page.
    """
    library = matplotlib()
    look = {
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.grid": False,
        "legend.frameon": False,
        "legend.fontsize": 10,
    }
    out = io.BytesIO()
    with library.rc_context(look):
        figure = library.figure.Figure(
            figsize=(WIDTH, height), dpi=150, layout="constrained", facecolor="white"
        )
        draw(figure, measured)
        figure.savefig(out, format="png")
    return out.getvalue()


def spectrum(figure: Any, measured: Measured) -> None:
    """Exponents in descending order with intervals, one panel for each axis that they are taken
    along.
    """
    loop = measured.loop
    panels: list[tuple[str, list[tuple[str, np.ndarray]]]] = [
        ("stage", [("depth", measured.depth)])
    ]
    panels.append(("token", [("tokens", measured.along)]))
    if loop is not None:
        later = f"rounds {loop.dropped + 1} to {loop.followed}"
        panels.insert(
            0, ("round", [(f"rounds 1 to {loop.trained}", loop.start), (later, loop.exponents)])
        )
    for axes, (unit, series) in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        for place, (label, values) in enumerate(series):
            mean, low, high = interval(values)
            at = np.arange(1, len(mean) + 1) + 0.12 * (place - (len(series) - 1) / 2)
            color, mark = ((BLUE, "o"), (RED, "s"))[place]
            # a mean rounds otherwise than its interval's ends
            error = np.maximum([mean - low, high - mean], 0)
            axes.errorbar(
                at,
                mean,
                error,
                fmt=mark,
                color=color,
                capsize=3,
                markersize=4,
                label=f"along {label}",
            )
        axes.axhline(0, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_ylabel(f"exponent per {unit}")
        axes.legend()
    axes.set_xlabel("number of the exponent")


def rounds(figure: Any, measured: Measured) -> None:
    """Contraction by round: median and band over tokens."""
    loop = _loop(measured)
    ratios = loop.contraction.transpose(1, 0, 2).reshape(loop.contraction.shape[1], -1)
    told = np.isfinite(ratios).any(axis=1)
    at = np.arange(2, len(ratios) + 2)[told]
    axes = figure.add_subplot()
    low, middle, high = np.nanquantile(ratios[told], [0.05, 0.5, 0.95], axis=1)
    axes.fill_between(at, low, high, color=SKY, alpha=0.4, linewidth=0, label="90% of tokens")
    axes.plot(at, middle, "o-", color=BLUE, markersize=4, label="median token")
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    axes.axvline(
        loop.trained,
        color=RED,
        linewidth=1.2,
        linestyle="--",
        label=f"rounds of training: {loop.trained}",
    )
    axes.set_xlim(min(loop.trained, 2) - 0.3, loop.followed + 0.3)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("step of this round / step of the last")
    axes.legend()


def tokens(figure: Any, measured: Measured) -> None:
    """How far the last stream moves from token to token, by position, and the slope."""
    typical = np.nanmean(measured.moves, axis=0)  # stands in where a sequence did not move at all
    mean, low, high = interval(np.where(np.isnan(measured.moves), typical, measured.moves))
    at = np.arange(1, len(mean) + 1)
    rate = float(np.mean(measured.settling))
    axes = figure.add_subplot()
    axes.fill_between(
        at, low, high, color=SKY, alpha=0.4, linewidth=0, label="95% interval over sequences"
    )
    axes.plot(at, mean, color=BLUE, linewidth=1.2, label="mean over sequences")
    line = mean.mean() + rate * (at - at.mean())
    axes.plot(at, line, "--", color=RED, linewidth=1.6, label=f"slope {rate:+.4f} per token")
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("log of the distance to the token before")
    axes.legend()


def drive(figure: Any, measured: Measured) -> None:
    """Drive ratio and departures by position."""
    loop = measured.loop
    count = (loop is not None) + bool(measured.departures)
    panels = list(figure.subplots(count, sharex=True, squeeze=False)[:, 0])
    if loop is not None:
        axes = panels[0]
        _by_position(axes, loop.drive_ratio.mean(axis=1), BLUE, "mean over rounds of training")
        axes.set_ylim(0, 1)
        axes.set_ylabel("drive ratio (share)")
        axes.legend()
    if measured.departures:
        axes = panels[-1]
        for what, values in measured.departures.items():
            _by_position(axes, values, {"drive": ORANGE, "messages": GREEN}[what], f"{what} off")
        axes.set_ylim(bottom=0)
        axes.set_ylabel("departure (times |x without|)")
        axes.legend()
    panels[-1].set_xlabel("position in the window (tokens)")


def traffic(figure: Any, measured: Measured) -> None:
    """Who talks to whom, how loudly: one heat map a stage, on one scale."""
    stages = measured.traffic
    loudest = max(float(np.max(loud)) for loud in stages.values())
    columns = _columns(len(stages))
    grid = figure.subplots(
        math.ceil(len(stages) / columns), columns, squeeze=False, sharex=True, sharey=True
    )
    for axes in grid.flat[len(stages) :]:
        axes.set_axis_off()
    for axes, (stage, loud) in zip(grid.flat[: len(stages)], stages.items(), strict=True):
        size = len(loud)
        # Groups are numbered from 1, so that the picture agrees with the words.
        picture = axes.imshow(
            loud, vmin=0, vmax=loudest, cmap="cividis", extent=(0.5, size + 0.5, size + 0.5, 0.5)
        )
        axes.locator_params(integer=True)
        axes.set_title(stage)
    for axes in grid[:, 0]:
        axes.set_ylabel("listening group")
    for axes in grid[-1]:
        axes.set_xlabel("speaking group")
    figure.colorbar(picture, ax=grid, label="loudness (root mean square)", shrink=0.8)


def traffic_height(stages: int) -> float:
    """Inches that the heat maps of so many stages need."""
    return 0.6 + 5.2 / _columns(stages) * math.ceil(stages / _columns(stages))


def _columns(stages: int) -> int:
    return 2 if stages <= 6 else 3


def paths(figure: Any, measured: Measured, labels: dict[int, str]) -> None:
    """Where some tokens of the first sequence, {position: text}, go over rounds, in the states'
    principal plane.
    """
    loop = _loop(measured)
    states = loop.path[:, list(labels)]
    plane, shares = principal(states)
    axes = figure.add_subplot()
    for place, (at, text) in enumerate(labels.items()):
        color, mark = MARKS[place % len(MARKS)]
        x, y = plane[:, place].T
        axes.plot(x, y, "-", color=color, linewidth=1.0)
        axes.plot(x[0], y[0], mark, color=color, markerfacecolor="white", markersize=7)
        axes.plot(x[1:-1], y[1:-1], ".", color=color, markersize=3)
        axes.plot(x[loop.trained], y[loop.trained], mark, color=color, markersize=7)
        axes.plot([], [], mark, color=color, label=f"{at + 1}: {text}")
    axes.set_xlabel(f"first principal direction ({shares[0]:.0%} of variance)")
    axes.set_ylabel(f"second ({shares[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    box = figure.legend(
        loc="outside lower center",
        ncols=2,
        title="position: text up to the token, the token in [ ]",
    )
    for text in box.get_texts():
        text.set_parse_math(False)  # a token may hold dollar signs
        text.set_family("monospace")


def principal(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States [..., D] in the plane of their two leading principal directions [..., 2], and its
    shares of variance.
    """
    flat = states.reshape(-1, states.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    # the same picture on any LAPACK
    flip = np.sign(vectors[np.argmax(np.abs(vectors), axis=0), range(len(values))])
    leading = (vectors * flip)[:, :-3:-1]
    return (flat @ leading).reshape(*states.shape[:-1], 2), values[:-3:-1] / max(
        values.sum(), 1e-30
    )


def _loop(measured: Measured) -> Loop:
    if measured.loop is None:
        raise ValueError("measured.loop: None; this figure is of models with a loop")
    return measured.loop


def _by_position(axes: Any, values: np.ndarray, color: str, label: str) -> None:
    """Mean over sequences of values [B, T], with the 95% interval."""
    mean, low, high = interval(values)
    at = np.arange(1, len(mean) + 1)
    axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0)
    axes.plot(at, mean, color=color, linewidth=1.2, label=label)
