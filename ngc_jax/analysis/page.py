"""The stability page: one HTML file that says, in numbers, pictures and words, how stable a trained
model is.

For: what stands on the page and in which order, and writing it with its figures. Not for: measuring
(`measures.py`), drawing (`figures.py`) or sentences (`words.py`). The page needs nothing but
itself: images are inline, no script.
"""

import base64
import math
import pathlib
from functools import partial
from html import escape
from typing import Any, NamedTuple

import numpy as np

from ngc_jax.analysis import figures
from ngc_jax.analysis.captions import caption, meaning
from ngc_jax.analysis.stability import Headline, Measured, headlines
from ngc_jax.data.tokens import Tokenizer
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.files import write_durably

SHOWN = 6  # tokens whose paths are drawn
BEFORE = 8  # tokens of text before each of them in its label
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; padding: 1rem; max-width: 46rem; font: 1rem/1.5 system-ui, sans-serif; }
body { overflow-wrap: break-word; } /* not "anywhere": a narrow column would break its words */
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
figure { margin: 0; } img { width: 100%; height: auto; border-radius: 4px; background: #fff; }
figcaption, caption, td.say { font-size: 0.9rem; }
caption { caption-side: bottom; text-align: left; padding-top: 0.6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.3rem 0.5rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8886; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
@media (max-width: 40rem) {
  .stack thead { display: none; } .stack tr { display: block; border-bottom: 1px solid #8886; padding: 0.4rem 0; }
  .stack th, .stack td { display: block; border: 0; padding: 0.1rem 0; }
}
"""


class Part(NamedTuple):
    """A section with a figure, or the reason why it has none."""

    name: str  # of the PNG
    title: str
    height: float  # inches
    draw: figures.Draw
    missing: str = ""


def write(
    out: pathlib.Path, measured: Measured, tokenizer: Tokenizer, title: str, about: str
) -> list[Headline]:
    """Write OUT/index.html and OUT/*.png; returns the headline numbers. Raises UserError if OUT
    cannot be written.
    """
    numbers = headlines(measured)
    pictures = [
        (part, b"" if part.missing else figures.png(part.draw, measured, part.height))
        for part in parts(measured, tokenizer)
    ]
    sections = [_section(part, picture, measured) for part, picture in pictures]
    try:
        for part, picture in pictures:
            if picture:
                (out / f"{part.name}.png").write_bytes(picture)
        write_durably(
            out / "index.html",
            _page(title, about, [_numbers(numbers), *sections, _bounds(measured)]),
        )
    except OSError as error:
        raise unwritable(out, error) from error
    return numbers


def unwritable(out: pathlib.Path, error: OSError) -> UserError:
    """What to say where the page cannot be written."""
    return UserError(f"--out={out} cannot be written ({error}): give a directory that can")


def parts(measured: Measured, tokenizer: Tokenizer) -> list[Part]:
    """The sections with figures, in order."""
    loop, stages = measured.loop, len(measured.traffic)
    no_rounds, no_answers, no_traffic = "", "", ""
    if loop is None:
        no_rounds = (
            "the model has no loop (model.core=0), so nothing in it is repeated over rounds."
        )
    elif not np.isfinite(loop.path).all():
        no_rounds = "the state stopped being finite while the loop was followed; try fewer rounds with --rounds."
    if not stages:
        no_traffic = "its groups send no messages (model.rule is 'dense' or 'none')."
    if loop is None and not measured.departures:
        no_answers = "the model has neither a drive (model.core=0) nor messages (model.rule is 'dense' or 'none')."
    paths = partial(figures.paths, labels=labels(measured.tokens[0], tokenizer))
    panels = (loop is not None) + bool(measured.departures)
    return [
        Part("spectrum", "Exponents", 0.4 + 2.4 * (2 if loop is None else 3), figures.spectrum),
        Part("rounds", "Contraction by round", 3.8, figures.rounds, no_rounds),
        Part("tokens", "Contraction by token", 3.8, figures.tokens),
        Part("drive", "Drive and departure", 0.4 + 2.6 * panels, figures.drive, no_answers),
        Part(
            "traffic",
            "Traffic between groups",
            figures.traffic_height(stages),
            figures.traffic,
            no_traffic,
        ),
        Part("paths", "Paths over rounds", 6.0, paths, no_rounds),
    ]


def labels(tokens: np.ndarray, tokenizer: Tokenizer) -> dict[int, str]:
    """Some positions of a sequence [T], evenly spread, with their text in ASCII: what is before,
    the token in [ ].
    """

    def text(piece: np.ndarray) -> str:
        return (
            tokenizer.decode(piece.tolist())
            .decode(errors="replace")
            .encode("unicode_escape")
            .decode("ascii")
        )

    chosen = np.unique(np.linspace(1, len(tokens) - 1, SHOWN).round().astype(int))
    named = {}
    for at in chosen.tolist():
        token = "document" if tokens[at] == tokenizer.mark else text(tokens[at : at + 1])
        named[at] = f"{text(tokens[max(0, at - BEFORE) : at])[-2 * BEFORE :]}[{token}]"
    return named


def describe(config: Any) -> str:
    """A run's config in one sentence."""
    m, t = config.model, config.train
    kind = (
        "An ordinary Transformer decoder"
        if m.rule == "dense"
        else "A Neuronal Group Communication decoder"
    )
    messages = "no messages" if m.rule == "none" else f"{m.rule!r} messages"
    between = "" if m.rule == "dense" else f", {m.groups} groups with {messages} between them"
    loop = f"{m.core} in a loop of {m.rounds} rounds" if m.core else "no loop"
    return (
        f"{kind}: width {m.width}, hidden {m.hidden}, {m.heads} heads{between}; stages: {m.prelude} before, {loop}, "
        f"{m.coda} after; trained for {t.steps:,} updates of {t.batch_size} windows of {config.data.context} tokens."
    )


def _page(title: str, about: str, sections: list[str]) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _section(part: Part, picture: bytes, measured: Measured) -> str:
    heading = f'<section id="{part.name}">\n<h2>{escape(part.title)}</h2>\n'
    if part.missing:
        return heading + f"<p>Left out: {escape(part.missing)}</p>\n</section>"
    source = "data:image/png;base64," + base64.b64encode(picture).decode()
    said = escape(caption(part.name, measured))
    image = f'<img src="{source}" alt="{escape(part.title)}">'
    return heading + f"<figure>\n{image}\n<figcaption>{said}</figcaption>\n</figure>\n</section>"


def _numbers(numbers: list[Headline]) -> str:
    rows = []
    for row in numbers:
        name = "leading exponent" if row.kind == "exponent" else row.kind
        name = name[0].upper() + name[1:]
        rows.append(
            f"<tr><th>{escape(name)}<br><small>{escape(row.where)}</small></th>"
            f'<td class="number">{number(row.mean)}<br><small>{number(row.low)} to {number(row.high)}</small></td>'
            f'<td>{escape(row.unit)}</td><td class="say">{escape(meaning(row))}</td></tr>'
        )
    return (
        '<section id="numbers">\n<h2>In numbers</h2>\n<table class="stack">\n<thead><tr><th>measure</th>'
        "<th>mean, 95% interval</th><th>unit</th><th>what it says</th></tr></thead>\n<tbody>\n"
        + "\n".join(rows)
        + "\n</tbody>\n<caption>Means over sequences; below each its 95% interval (bootstrap over sequences). The "
        "interval is about other text of this kind and this one model: another seed may differ by more than that."
        "</caption>\n</table>\n</section>"
    )


def _bounds(measured: Measured) -> str:
    heading = '<section id="bounds">\n<h2>The most that a synapse can stretch</h2>\n'
    if not measured.bounds:
        why = "the bound is of synapses that are linear, and this model's messages have an activation."
        return heading + f"<p>Left out: {why}</p>\n</section>"
    names = list(next(iter(measured.bounds.values())))
    head = "".join(f"<th>{escape(name)}</th>" for name in ("stage", *names))
    rows = [
        f"<tr><th>{escape(stage)}</th>{''.join(f'<td class=number>{number(row[name])}</td>' for name in names)}</tr>"
        for stage, row in measured.bounds.items()
    ]
    return (
        heading
        + f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + f"\n</tbody>\n<caption>{escape(caption('bounds', measured))}</caption>\n</table></div>\n</section>"
    )


def number(value: float) -> str:
    """A number to three digits, for people."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3g}" if abs(value) >= 0.001 or value == 0 else f"{value:.1e}"
