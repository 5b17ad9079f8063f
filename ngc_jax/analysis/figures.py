"""The figures of the stability page: each function draws one on an empty Matplotlib figure.

For: what `stability.py` measured. Not for: captions, or colours and files (`report/`).
"""

import math
from typing import Any

import numpy as np

from ngc_jax.analysis.stability import Measured, interval
from ngc_jax.report.figures import BLUE, ORANGE, PURPLE, RED, look

ALONG = "position in the window (tokens)"


def spectrum(figure: Any, measured: Measured) -> None:
    """Exponents in descending order with intervals, one panel for each direction."""
    loop = measured.loop
    panels: dict[str, dict[str, np.ndarray]] = {}
    if loop is not None:
        first, later = f"1 to {loop.trained}", f"{loop.dropped + 1} to {loop.followed}"
        panels["round"] = {f"rounds {first}": loop.start, f"rounds {later}": loop.exponents}
    panels |= {"stage": {"along depth": measured.depth}, "token": {"along tokens": measured.along}}
    grid = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (unit, series) in zip(grid, panels.items(), strict=True):
        for place, (label, values) in enumerate(series.items()):
            mean, low, high = interval(np.where(np.isinf(values), np.nan, values))  # not drawn
            # a mean rounds otherwise than its interval's ends
            error = np.maximum([mean - low, high - mean], 0)
            color, mark = ((BLUE, "o"), (RED, "s"))[place]
            at = np.arange(1, len(mean) + 1) + 0.12 * (place - (len(series) - 1) / 2)
            axes.errorbar(at, mean, error, fmt=mark, color=color, capsize=3, label=label)
        axes.axhline(0, color="0.5", linewidth=0.8, linestyle=":")
        axes.set_ylabel(f"exponent\n(nats per {unit})")
        axes.legend()
    axes.set_xlabel("index of the exponent (1: the largest)")


def rounds(figure: Any, measured: Measured) -> None:
    """Contraction by round: median and 90% band over tokens."""
    loop = measured.loop
    assert loop is not None  # see `page.py`
    ratios = loop.contraction.transpose(1, 0, 2).reshape(loop.contraction.shape[1], -1)
    known = np.isfinite(ratios).any(axis=1)
    at = np.arange(2, len(ratios) + 2)[known]
    low, middle, high = np.nanquantile(ratios[known], [0.05, 0.5, 0.95], axis=1)
    axes = figure.add_subplot()
    axes.fill_between(at, low, high, color=BLUE, alpha=0.3, linewidth=0, label="90% of tokens")
    axes.plot(at, middle, "o-", color=BLUE, label="median over tokens")
    axes.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    last = f"last round of training: {loop.trained}"
    axes.axvline(loop.trained, color=RED, linestyle="--", label=last)
    axes.set_xlim(min(loop.trained, 2) - 0.3, loop.followed + 0.3)
    axes.locator_params(axis="x", integer=True)
    axes.set(xlabel="round", ylabel="contraction\n(step / previous step)")
    axes.legend()


def tokens(figure: Any, measured: Measured) -> None:
    """The distance of the last stage's state between neighbouring tokens, by position."""
    typical = np.nanmean(measured.moves, axis=0)  # where a sequence did not move at all
    moves = np.where(np.isnan(measured.moves), typical, measured.moves)
    axes, rate = figure.add_subplot(), float(np.mean(measured.settling))
    at, mean = _by_position(axes, moves, BLUE, "mean over sequences", "95% interval")
    line = mean.mean() + rate * (at - at.mean())
    axes.plot(at, line, "--", color=RED, label=f"fit: slope {rate:+.4f} per token")
    axes.set(xlabel=ALONG, ylabel="log of the relative distance\nto the previous token's state")
    axes.legend()


def drive(figure: Any, measured: Measured) -> None:
    """Drive ratio and departures by position."""
    loop = measured.loop
    count = (loop is not None) + bool(measured.departures)
    panels = figure.subplots(count, sharex=True, squeeze=False)[:, 0]
    if loop is not None:
        ratios = loop.drive_ratio.mean(axis=1)
        _by_position(panels[0], ratios, BLUE, "mean over rounds of training")
        panels[0].set(ylim=(0, 1), ylabel="drive ratio\n(fraction)")
    for what, values in measured.departures.items():
        color = {"drive": ORANGE, "messages": PURPLE}[what]
        _by_position(panels[-1], values, color, f"{what} off")
    if measured.departures:
        panels[-1].set(ylim=(0, None), ylabel="departure\n(relative distance)")
    for axes in panels:
        axes.legend()
    panels[-1].set_xlabel(ALONG)


def traffic(figure: Any, measured: Measured) -> None:
    """The loudness of messages between groups: one heat map for each stage, on one scale."""
    stages = measured.traffic
    loudest = max(float(np.max(loud)) for loud in stages.values())
    grid = figure.subplots(*grid_of(len(stages)), squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(stages) :]:
        axes.set_axis_off()
    for axes, (stage, loud) in zip(grid.flat, stages.items(), strict=False):
        end = len(loud) + 0.5  # groups are numbered from 1, as in the words
        extent = (0.5, end, end, 0.5)
        map_ = axes.imshow(loud, vmin=0, vmax=loudest, cmap="cividis", extent=extent)
        axes.locator_params(integer=True)
        axes.set_title(stage)
    for axes in grid[:, 0]:
        axes.set_ylabel("receiving group")
    for axes in grid[-1]:
        axes.set_xlabel("sending group")
    figure.colorbar(map_, ax=grid, label="message (root mean square)", shrink=0.8)


def grid_of(stages: int) -> tuple[int, int]:
    """Rows and columns of heat maps, one for each stage."""
    columns = 2 if stages <= 6 else 3
    return math.ceil(stages / columns), columns


def paths(figure: Any, measured: Measured, labels: dict[int, str]) -> None:
    """The states of tokens of the first sequence, {position: text}, in their principal plane."""
    loop = measured.loop
    assert loop is not None  # see `page.py`
    plane, fractions = principal(loop.path[:, list(labels)])
    axes = figure.add_subplot()
    for place, (at, text) in enumerate(labels.items()):
        color, mark, _ = look(place, place).values()
        x, y = plane[:, place].T
        axes.plot(x, y, "-", color=color, linewidth=1.0)
        axes.plot(x[0], y[0], mark, color=color, markerfacecolor="white", markersize=7)
        axes.plot(x[1:-1], y[1:-1], ".", color=color, markersize=3)
        axes.plot(x[loop.trained], y[loop.trained], mark, color=color, markersize=7)
        axes.plot([], [], mark, color=color, label=f"{at + 1}: {text}")
    axes.set_xlabel(f"first principal direction ({fractions[0]:.0%} of the variance)")
    axes.set_ylabel(f"second principal direction ({fractions[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    title = "position: text before the token, the token in [ ]"
    box = figure.legend(loc="outside lower center", ncols=2, title=title)
    for text in box.get_texts():
        text.set_parse_math(False)  # a token may hold dollar signs
        text.set_family("monospace")


def principal(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """States [..., D] in the plane of two principal directions [..., 2]; fractions of variance."""
    flat = states.reshape(-1, states.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    values, vectors = np.linalg.eigh(flat.T @ flat)
    # the same signs with any LAPACK
    signs = np.sign(vectors[np.argmax(np.abs(vectors), axis=0), range(len(values))])
    plane = flat @ (vectors * signs)[:, :-3:-1]
    return plane.reshape(*states.shape[:-1], 2), values[:-3:-1] / max(values.sum(), 1e-30)


def _by_position(
    axes: Any, values: np.ndarray, color: str, label: str, band: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws, and returns, positions and the mean over sequences of values [B, T], with its band."""
    mean, low, high = interval(values)
    at = np.arange(1, len(mean) + 1)
    axes.fill_between(at, low, high, color=color, alpha=0.3, linewidth=0, label=band)
    axes.plot(at, mean, color=color, label=label)
    return at, mean
