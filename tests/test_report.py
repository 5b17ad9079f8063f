"""Pages and their blocks: one content in two forms, escaped in both; figures with many kinds."""

import re

import pytest
from conftest import ROOT

from ngc_jax.report import figures, page
from ngc_jax.report.blocks import heading, image, listing, paragraph, table, to_markdown


@pytest.mark.parametrize(
    ("plain", "markdown", "html"),
    [
        ("p < 0.001, x > 1", "p < 0.001, x > 1", "p &lt; 0.001, x &gt; 1"),
        ("a <b> & &lt;", r"a \<b> & \&lt;", "a &lt;b&gt; &amp; &amp;lt;"),
        ("2 * 3 *x* ~y~", r"2 * 3 \*x\* \~y\~", "2 * 3 *x* ~y~"),
        ("snake_case and _so_", r"snake_case and \_so\_", "snake_case and _so_"),
        ("[T, D] but [a](b)", r"[T, D] but [a\](b)", "[T, D] but [a](b)"),
        ("use `a_b <c> *d*` x*", r"use `a_b <c> *d*` x\*", "use <code>a_b &lt;c&gt; *d*</code> x*"),
        ("# of a\n1. b\n- c", "\\# of a\n1\\. b\n\\- c", None),
        ("one ` alone", r"one \` alone", "one ` alone"),
    ],
)
def test_text_is_escaped_in_both_forms(plain, markdown, html):
    assert to_markdown(plain) == markdown
    assert html is None or paragraph(plain).html == f"<p>{html}</p>"


def test_a_table_keeps_its_columns_and_says_what_they_are():
    made = table(["a | b", "x"], [["1.5 ± 0.1", "two\nlines"], ["`c|d`", "<i>"]], "Of *x*.")
    assert made.markdown.splitlines() == [
        r"| a \| b | x |",
        "| --- | --- |",
        "| 1.5 ± 0.1 | two<br>lines |",
        r"| `c\|d` | \<i> |",
        "",
        r"Of \*x\*.",
    ]
    assert '<td class="number">1.5 ± 0.1</td><td>two<br><small>lines</small></td>' in made.html
    assert '<p class="caption">Of *x*.</p>' in made.html


def test_a_table_that_is_too_wide_for_a_phone_tells_the_reader_to_scroll():
    cue = "Scroll this table sideways: 4 columns."
    assert cue in table(list("abcd"), []).html
    assert "Scroll" not in table(list("abc"), []).html
    assert "Scroll" not in table(list("abcd"), [], stacked=True).html
    # On narrow screens only, and above the frame that scrolls.
    narrow = r"\.cue { display: none;.*max-width: 40rem.*\.cue { display: block; }"
    assert re.search(narrow, page.STYLE, re.DOTALL)
    assert table(list("abcd"), []).html.index(cue) < table(list("abcd"), []).html.index("wide")


def test_a_page_holds_all_that_it_shows(tmp_path):
    blocks = [
        heading("How <much>?", "much"),
        image("curve", b"\x89PNG", "Loss: of all. More."),
        listing(["a < b"], "Commands"),
        listing(["python x"]),
    ]
    page.write(tmp_path, "out", "A <title>", blocks)
    html, text = (tmp_path / "out.html").read_text(), (tmp_path / "out.md").read_text()
    assert "<title>A &lt;title&gt;</title>" in html
    assert '<h2 id="much">How &lt;much&gt;?</h2>' in html
    assert '<img alt="Loss" src="data:image/png;base64,iVBORw==">' in html
    assert "<details><summary>Commands</summary>" in html
    assert "http" not in html
    assert text.startswith(
        "# A \\<title>\n\n## How \\<much>?\n\n![Loss](curve.png)\n\nLoss: of all."
    )
    assert text.endswith("Commands:\n\n    a < b\n\n    python x\n")
    assert (tmp_path / "curve.png").read_bytes() == b"\x89PNG"
    page.write(tmp_path, "only", "T", blocks, markdown=False)
    assert not (tmp_path / "only.md").exists()


def test_forty_kinds_or_variants_look_different():
    def distinct(kinds, variants):
        looks = [figures.look(i, j, variants) for i in range(kinds) for j in range(variants)]
        return len({tuple(sorted(one.items())) for one in looks}) == len(looks)

    assert all(distinct(*of) for of in ((40, 1), (10, 4), (13, 3), (3, 13), (2, 20), (1, 40)))
    # Ten kinds have a colour each, and their variants keep it.
    assert len({figures.look(kind)["color"] for kind in range(10)}) == 10
    assert len({figures.look(3, variant, 4)["color"] for variant in range(4)}) == 1


def test_a_figure_is_the_same_bytes_whatever_style_the_user_has(monkeypatch):
    def drawn():
        return figures.figure("f", "A line.", lambda canvas: canvas.subplots().plot([0, 1]), 2, 3)

    first = drawn()
    monkeypatch.setitem(figures.matplotlib().rcParams, "axes.facecolor", "black")
    monkeypatch.setitem(figures.matplotlib().rcParams, "figure.facecolor", "black")
    assert drawn() == first
    assert figures.matplotlib().rcParams["axes.facecolor"] == "black"


def test_only_the_report_room_writes_html():
    """One writer of pages: no other file holds a page's skeleton or style."""
    for path in [*(ROOT / "ngc_jax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        if path.parent.name != "report":
            assert "<html" not in path.read_text(), path
            assert "max-width" not in path.read_text(), path


def test_no_text_ends_a_heading_a_listing_or_a_row():
    text = "a\n# b\n\n---\n> `c\n* d | e\n\n    f"
    assert heading(text).markdown == r"## a # b --- > \`c * d | e f"
    assert all(line[:4] == "    " for line in listing([text]).markdown.split("\n"))
    assert len(table([text, "x"], [[text, text]]).markdown.splitlines()) == 3
    assert paragraph(text).markdown.splitlines()[1:5] == [r"\# b", "", r"\---", r"\> \`c"]
    assert paragraph("===\n- - -\n+ a\n-0.5").markdown == "\\===\n\\- - -\n\\+ a\n-0.5"
