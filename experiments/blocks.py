"""What a report is made of: headings, words, tables and figures, and their two forms, Markdown and
HTML.

For: writing one content twice. Not for: what stands in it (`report.py`, and each study).
"""

import base64
import dataclasses
import pathlib
import re
from collections.abc import Sequence
from html import escape

from ngc_jax.analysis.page import STYLE

WIDER = "body { max-width: 72rem; } figure, .wide, details { margin: 1.2rem 0; } figure { max-width: 46rem; }"


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str

    def markdown(self) -> str:
        return f"## {self.text}"

    def html(self) -> str:
        return f"<h2>{escape(self.text)}</h2>"


@dataclasses.dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str

    def markdown(self) -> str:
        return self.text

    def html(self) -> str:
        return f"<p>{escape(self.text)}</p>"


@dataclasses.dataclass(frozen=True)
class Table:
    """A head and rows of as many cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head)
        rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in self.rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}</tbody></table></div>'


def _cell(text: str) -> str:
    number = re.fullmatch(r"[-\d.,]+( ± [\d.]+)?", text)  # which is not to be broken
    return f'<td class="number">{escape(text)}</td>' if number else f"<td>{escape(text)}</td>"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, kept as NAME.png beside the Markdown and inside the HTML."""

    name: str
    png: bytes
    caption: str

    def markdown(self) -> str:
        return f"![{self.caption}]({self.name}.png)\n\n{self.caption}"

    def html(self) -> str:
        data = base64.b64encode(self.png).decode()
        image = f'<img alt="{escape(self.caption, quote=True)}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclasses.dataclass(frozen=True)
class Listing:
    """Lines of a terminal, folded away on the page."""

    title: str
    lines: Sequence[str]

    def markdown(self) -> str:
        return "\n".join([f"{self.title}:", "", *(f"    {line}" for line in self.lines)])

    def html(self) -> str:
        text = escape("\n".join(self.lines))
        return f'<details><summary>{escape(self.title)}</summary><pre class="wide">{text}</pre></details>'


Block = Heading | Words | Table | Picture | Listing


def write(home: pathlib.Path, name: str, title: str, blocks: Sequence[Block]) -> None:
    """HOME/NAME.md, HOME/NAME.html and a PNG of each figure."""
    for block in blocks:
        if isinstance(block, Picture):
            (home / f"{block.name}.png").write_bytes(block.png)
    (home / f"{name}.md").write_text(
        "\n\n".join([f"# {title}", *(block.markdown() for block in blocks)]) + "\n"
    )
    body = "\n".join(block.html() for block in blocks)
    (home / f"{name}.html").write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{WIDER}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
