"""The blocks of a page: headings, paragraphs, tables, images, listings.

For: plain text, in Markdown and in HTML, with `code` in backticks. Not for: pages (`page.py`).
"""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

CODE = re.compile(r"(`[^`\n]+`)")
# What Markdown reads as markup inside a line, and at its beginning.
INSIDE = re.compile(
    r"(\\|`|\*(?=\S)|(?<=\S)\*|~|\$|(?<!\w)_|_(?!\w)|<(?=[\w/!?])|\](?=[(\[:])|&(?=\S+;))"
)
FIRST = re.compile(r"^(\s*\d*)(>|#(?=#*\s)|[+*.)-](?=\s)|[=-](?=[=-]*\s*$))", re.MULTILINE)
NUMBER = re.compile(r"(< )?[-\d.,]+( ± [\d.,]+)?")
FEW = 3  # columns that fit on the screen of a phone


class Block(NamedTuple):
    """A part of a page in its two forms, and files that the Markdown refers to."""

    markdown: str
    html: str
    files: Mapping[str, bytes] = {}


def to_html(text: str) -> str:
    """Plain text as HTML: `code` as an element, all lines but the first in small print."""
    first, *rest = CODE.sub(lambda code: f"<code>{code[0][1:-1]}</code>", escape(text)).split("\n")
    return first + "".join(f"<br><small>{line}</small>" for line in rest)


def to_markdown(text: str, inside: bool = False) -> str:
    """Plain text as Markdown, `code` unchanged. `inside` a line no marks of its beginning count."""
    parts = CODE.split(text)  # every second one is code
    parts[::2] = [INSIDE.sub(r"\\\1", part) for part in parts[::2]]
    return "".join(parts) if inside else FIRST.sub(r"\1\\\2", "".join(parts))


def heading(text: str, anchor: str = "", level: int = 2) -> Block:
    """A heading, in one line. `anchor`: a name for links to it."""
    text, name = " ".join(text.split()), f' id="{escape(anchor)}"' if anchor else ""
    html = f"<h{level}{name}>{to_html(text)}</h{level}>"
    return Block(f"{'#' * level} {to_markdown(text)}", html)


def paragraph(text: str) -> Block:
    return Block(to_markdown(text), f"<p>{to_html(text)}</p>")


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", stacked: bool = False
) -> Block:
    """Column heads, rows of as many cells, and a caption. Phones scroll all but `stacked` ones."""
    cells = [[to_markdown(c, True).replace("|", "\\|") for c in row] for row in [head, *rows]]
    cells.insert(1, ["---"] * len(head))
    text = "\n".join(f"| {' | '.join(row)} |".replace("\n", "<br>") for row in cells)
    heads = "".join(f"<th>{to_html(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    html = f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}</tbody></table>"
    cue = f'<p class="cue">Scroll this table sideways: {len(head)} columns.</p>\n'
    frame = '<div class="wide" tabindex="0" role="region" aria-label="table">'
    scrolled = f"{cue if len(head) > FEW else ''}{frame}<table>{html}</div>"
    html = f'<table class="stack">{html}' if stacked else scrolled
    if caption:
        text += f"\n\n{to_markdown(caption)}"
        html += f'\n<p class="caption">{to_html(caption)}</p>'
    return Block(text, html)


class Shade(NamedTuple):
    """A cell of a `grid`: its text, how strong its colour is in [-1, 1], and what hover says."""

    text: str
    strength: float
    title: str


def grid(head: Sequence[str], rows: Sequence[tuple[str, Sequence[Shade]]], caption: str) -> Block:
    """A map of shades: names of rows and columns, and cells, red above 0 and blue below."""
    made = table(head, [[name, *(shade.text for shade in of)] for name, of in rows], caption)
    cells = "".join(f"<th>{to_html(name)}</th>" for name in head)
    body = "".join(
        f'<tr><td class="number">{to_html(name)}</td>{"".join(map(_shaded, of))}</tr>\n'
        for name, of in rows
    )
    html = '<div class="wide" tabindex="0" role="region" aria-label="map"><table class="grid">'
    html += f"<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}</tbody></table></div>"
    return Block(made.markdown, f'{html}\n<p class="caption">{to_html(caption)}</p>')


def _shaded(shade: Shade) -> str:
    colour = "213, 94, 0" if shade.strength > 0 else "0, 114, 178"
    alpha = min(1.0, abs(shade.strength)) * 0.8
    style = f"background: rgba({colour}, {alpha:.2f})"
    return f'<td style="{style}" title="{escape(shade.title)}">{escape(shade.text)}</td>'


def _cell(text: str) -> str:
    number = NUMBER.fullmatch(text.partition("\n")[0])  # which is not broken over lines
    return f'<td class="number">{to_html(text)}</td>' if number else f"<td>{to_html(text)}</td>"


def image(name: str, png: bytes, caption: str) -> Block:
    """A figure: NAME.png beside the Markdown, and inside the HTML."""
    instead = re.split(r"[.:]\s", caption)[0]  # of the image, where it cannot be shown
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    text = f"![{to_markdown(instead)}]({name}.png)\n\n{to_markdown(caption)}"
    html = f'<figure><img alt="{escape(instead)}" src="{source}">\n'
    html += f"<figcaption>{to_html(caption)}</figcaption></figure>"
    return Block(text, html, {f"{name}.png": png})


def listing(lines: Sequence[str], title: str = "") -> Block:
    """Lines of a terminal or a file. A listing with a title is folded in the HTML."""
    shown = "\n".join(lines)
    text = "    " + "\n    ".join(shown.split("\n"))
    html = f'<pre class="wide">{escape(shown)}</pre>'
    if title:
        text = f"{to_markdown(title)}:\n\n{text}"
        html = f"<details><summary>{to_html(title)}</summary>{html}</details>"
    return Block(text, html)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table for a terminal, its first `left` columns flush left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    put = [zip(sides, row, widths, strict=True) for row in rows]
    return "\n".join("  ".join(side(cell, n) for side, cell, n in line) for line in put)
