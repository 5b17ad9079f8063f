"""The stability page: one HTML file with numbers, figures and explanations of a trained model.

For: its content, in order. Not for: measuring, drawing, captions (beside it), HTML (`report/`).
"""

import math
import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from ngc_jax.analysis import captions, figures
from ngc_jax.analysis.stability import Headline, Measured, headlines
from ngc_jax.data.settings import counted
from ngc_jax.data.tokenizer import Labels, Tokenizer
from ngc_jax.report import page
from ngc_jax.report.blocks import Block, heading, paragraph, table
from ngc_jax.report.figures import figure
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.output import come, doing

SHOWN = 6  # tokens whose paths are drawn
BEFORE = 8  # tokens of text before each of them in its label
WIDTH = 6.4  # inches of a figure
NO_LOOP = "the model has no loop (`model.core=0`), so nothing is repeated over rounds."
NO_MESSAGES = "the model sends no messages (`model.rule` is 'dense' or 'none')."


def write(
    out: pathlib.Path, measured: Measured, tokenizer: Tokenizer, title: str, about: str
) -> list[Headline]:
    """Writes OUT/index.html and OUT/*.png; returns the headline numbers. Raises UserError."""
    numbers = headlines(measured)
    with doing("drawing"):
        blocks = [paragraph(about), *_numbers(numbers), *_figures(measured, tokenizer)]
    try:
        page.write(out, "index", title, [*blocks, *_bounds(measured)], markdown=False)
    except OSError as error:
        raise unwritable(out, error) from error
    return numbers


def unwritable(out: pathlib.Path, error: OSError) -> UserError:
    """The error for a directory in which the page cannot be written."""
    return UserError(f"--out={out} cannot be written ({error}): give another directory")


def _figures(measured: Measured, tokenizer: Tokenizer) -> Iterator[Block]:
    """The sections with figures, in order, or the reasons why they have none."""
    loop, stages = measured.loop, len(measured.traffic)
    no_rounds = NO_LOOP if loop is None else ""
    if loop is not None and not np.isfinite(loop.path).all():
        no_rounds = "the state became infinite or undefined: try fewer rounds with `--rounds`."
    panels = (loop is not None) + bool(measured.departures)
    exponents, drives = 0.4 + 2.4 * (2 if loop is None else 3), 0.4 + 2.6 * panels
    rows, columns = figures.grid_of(stages)
    between = 0.6 + 5.2 / columns * rows
    no_messages = "" if stages else NO_MESSAGES
    no_drive = "" if panels else "the model has neither a loop nor messages."
    if isinstance(tokenizer, Labels):
        chosen = np.linspace(0, measured.moves.shape[1], SHOWN).round().astype(int)
        named = {at: f"patch {at}" for at in np.unique(chosen).tolist()}
    else:
        named = labels(measured.tokens[0], tokenizer)
    paths = partial(figures.paths, labels=named)
    parts: list[tuple[str, str, float, Any, str]] = [
        ("spectrum", "Lyapunov exponents", exponents, figures.spectrum, ""),
        ("rounds", "Contraction by round", 3.8, figures.rounds, no_rounds),
        ("tokens", "Contraction by token", 3.8, figures.tokens, ""),
        ("drive", "Drive and departure", drives, figures.drive, no_drive),
        ("traffic", "Traffic between groups", between, figures.traffic, no_messages),
        ("paths", "Paths of states over rounds", 6.0, paths, no_rounds),
    ]
    for number, (name, title, height, draw, missing) in enumerate(parts):
        come(number, len(parts))
        yield heading(title, name)
        if missing:
            yield paragraph(f"Left out: {missing}")
        else:
            said = getattr(captions, name)(measured)
            yield figure(name, said, partial(draw, measured=measured), height, WIDTH)


def labels(tokens: np.ndarray, tokenizer: Tokenizer) -> dict[int, str]:
    """Evenly spread positions of a sequence [T], with the text before the token, and it in [ ]."""

    def text(piece: np.ndarray) -> str:
        plain = tokenizer.decode(piece.tolist()).decode(errors="replace")
        return plain.encode("unicode_escape").decode("ascii")

    chosen = np.unique(np.linspace(1, len(tokens) - 1, SHOWN).round().astype(int))
    named = {}
    for at in chosen.tolist():
        token = "document" if tokens[at] == tokenizer.mark else text(tokens[at : at + 1])
        named[at] = f"{text(tokens[max(0, at - BEFORE) : at])[-2 * BEFORE :]}[{token}]"
    return named


def describe(config: Any) -> str:
    """A run's model, its sizes and its updates, in three sentences."""
    m, i, t = config.model, config.iteration, config.train
    forms = {"recurrent": "recurrent model", "bdh": "BDH (arXiv 2509.26507)"}
    form = (forms | {"vision": "model of images"}).get(m.kind, m.kind)
    drawn = "" if i.rounds == "fixed" else f" ({i.low} to {i.high} in training, {i.rounds})"
    sizes = f"{m.heads} heads; stages: {m.prelude}, then {m.core} in {m.rounds} rounds{drawn}"
    others = {"recurrent": f"{m.core} cells in {m.rounds} rounds a token"}
    others["bdh"] = f"{m.heads} heads; one layer, {m.rounds} times"
    unit, each = counted(config.data)
    batch = unit if unit == "images" else f"windows of {each} {unit}"
    what = f"a dense {form}, for comparison"
    if m.kind != "bdh" and m.rule != "dense":
        intra = f"up to {m.p_intra} numbers a neuron" if m.p_intra else "none"
        what = (
            f"a Neuronal Group Communication {form}: {m.groups} groups, intra-group part: {intra}; "
            f"between groups: {m.rule} with {m.p_inter} numbers, message activation "
            f"{m.message_activation}"
        )
    return (
        f"A model trained from scratch, {what}. Width {m.width}, hidden {m.hidden}, "
        f"{others.get(m.kind, f'{sizes}, then {m.coda}')}. Trained for {t.steps:,} updates of "
        f"{t.batch_size} {batch}."
    )


def _numbers(numbers: list[Headline]) -> list[Block]:
    rows = []
    for row in numbers:
        name = "leading exponent" if row.kind == "exponent" else row.kind
        value = f"{number(row.mean)}\n{number(row.low)} to {number(row.high)}"
        name = f"{name[0].upper()}{name[1:]}\n{row.where}"
        rows.append([name, value, row.unit, captions.meaning(row)])
    head = ["measure", "mean\n95% interval", "unit", "what it means"]
    numbered = table(head, rows, captions.NUMBERS, stacked=True)
    return [heading("In numbers", "numbers"), numbered]


def _bounds(measured: Measured) -> list[Block]:
    title = heading("Bounds of the synapses", "bounds")
    if not measured.bounds:
        why = "the bound needs linear synapses, and this model's messages have an activation."
        return [title, paragraph(f"Left out: {why}")]
    stages = measured.bounds.items()
    rows = [[stage, *map(number, synapses.values())] for stage, synapses in stages]
    names = next(iter(measured.bounds.values()))
    return [title, table(["stage", *names], rows, captions.BOUNDS)]


def number(value: float) -> str:
    """A number with three digits."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
