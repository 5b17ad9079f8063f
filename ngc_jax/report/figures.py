"""Figures of pages: Matplotlib, PNGs on white, and one set of colours, marks and lines.

For: the same look on every page. Not for: what is drawn.
"""

import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ngc_jax.report.blocks import Block, image
from ngc_jax.runtime.errors import UserError

WIDTH = 7.0  # inches
# Okabe and Ito's colours, which the colour-blind tell apart, without their yellow; and three more.
BLUE, RED, GREEN, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#56b4e9"
PURPLE, BLACK, GREY, BROWN, OLIVE = "#cc79a7", "#000000", "#8a8a8a", "#7f4f24", "#999933"
COLOURS = (BLUE, RED, GREEN, ORANGE, SKY, PURPLE, BLACK, GREY, BROWN, OLIVE)
MARKS = "osD^vPX<>p"
LINES = ("-", "--", ":", "-.")
STYLE: dict[str, Any] = {"font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9}
STYLE |= {"legend.frameon": False, "lines.linewidth": 1.3, "lines.markersize": 4.5}


def matplotlib() -> ModuleType:
    """The library that draws. Raises UserError where it is not installed."""
    try:
        import matplotlib.figure
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'ngc_jax[plot]'") from error
    return matplotlib


def figure(
    name: str, caption: str, draw: Callable[[Any], None], height: float = 4.0, width: float = WIDTH
) -> Block:
    """What draw(figure) draws, as a block, on white. height, width: in inches."""
    library, out = matplotlib(), io.BytesIO()
    with library.rc_context():
        library.rcdefaults()  # a user's own style may be dark
        library.rcParams.update(STYLE)
        canvas = library.figure.Figure((width, height), 150, layout="constrained")
        draw(canvas)
        canvas.savefig(out, format="png", metadata={"Software": None})
    return image(name, out.getvalue(), caption)


def look(kind: int, variant: int = 0, variants: int = 1) -> dict[str, str]:
    """Colour, mark and line of a kind, or of one of its variants, all distinct for 40 of them."""
    turn, colour = divmod(kind, len(COLOURS))
    at = turn * variants + variant
    mark, line = MARKS[at % len(MARKS)], LINES[(at + at // len(MARKS)) % len(LINES)]
    return {"color": COLOURS[colour], "marker": mark, "linestyle": line}
