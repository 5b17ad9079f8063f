"""Whole pages: one self-contained HTML file, and the same content as Markdown.

For: style (light or dark, and for phones) and files. Not for: the parts of a page (`blocks.py`).
"""

import pathlib
from collections.abc import Sequence
from html import escape

from ngc_jax.report.blocks import Block, heading
from ngc_jax.runtime.files import write_durably

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="ngc_jax">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""
# A wide table has a shadow at each end that can be scrolled to: two gradients of the page's colour
# scroll with the table and cover the two shadows, which do not.
STYLE = """
:root { color-scheme: light dark; --line: #8886; --shadow: #888a; }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; font: 1rem/1.5 system-ui, sans-serif;
  overflow-wrap: break-word; background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
p, figure { max-width: 46rem; } figure, .wide { margin: 1.2rem 0; }
img { width: 100%; height: auto; border-radius: 4px; background: #fff; }
figcaption, .caption, .cue, pre { font-size: 0.9rem; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.3rem 0.5rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.grid { width: auto; } .grid td { padding: 0.1rem 0.3rem; text-align: center;
  white-space: pre; font-variant-numeric: tabular-nums; }
.grid td:first-child { text-align: left; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; background:
  linear-gradient(to right, Canvas 2rem, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, Canvas 2rem, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--shadow), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shadow), transparent) right / 1rem 100% no-repeat scroll; }
.cue { display: none; margin-bottom: -1rem; font-style: italic; }
@media (max-width: 40rem) {
  .cue { display: block; } .stack thead { display: none; }
  .stack tr { display: block; border-bottom: 1px solid var(--line); padding: 0.4rem 0; }
  .stack td { display: block; border: 0; padding: 0.1rem 0; }
  .stack td:first-child { font-weight: bold; }
}
"""


def write(
    home: pathlib.Path, name: str, title: str, blocks: Sequence[Block], markdown: bool = True
) -> None:
    """Writes HOME/NAME.html, its blocks' files and, if `markdown`, HOME/NAME.md. Raises OSError."""
    parts, written = [heading(title, level=1), *blocks], dict[str, str | bytes]()
    for part in parts:
        written |= part.files
    if markdown:
        written[f"{name}.md"] = "\n\n".join(part.markdown for part in parts) + "\n"
    body = "\n".join(part.html for part in parts)
    head = f"{HEAD}<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
    written[f"{name}.html"] = f"{head}<body>\n{body}\n</body>\n</html>\n"
    for file, data in written.items():
        write_durably(home / file, data)
