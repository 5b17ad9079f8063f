"""The page of all settings: `python -m ngc_jax.settings > docs/settings.md`.

For: writing docs/settings.md anew. Not for: the tables (`settings.py` of the rooms).
"""

import argparse

from ngc_jax.commands.arguments import command
from ngc_jax.config import SECTIONS
from ngc_jax.nn.settings import MODELS
from ngc_jax.report.blocks import heading, paragraph, table
from ngc_jax.runtime.fields import COLUMNS, rows_of

HEAD = """\
Every field of a config, with its default. A config file sets a field in Python, as in
`config.train.steps = 2000`. The command line sets it by `--config.train.steps=2000`. Values that
cannot be, and values of fields that nothing reads, are refused before anything is written.

`python launch.py --help` prints these tables. `python -m ngc_jax.settings > docs/settings.md`
writes this page."""
KINDS = """\
A kind of model reads these fields of `config.model`, and `kind`, `match` and `match_by`. All others
must be at their defaults."""


def page() -> str:
    """The page, in Markdown."""
    blocks = [heading("Settings", level=1), paragraph(HEAD)]
    for section in SECTIONS:
        rows = [[f"`{name}`", f"`{default}`", *rest] for name, default, *rest in rows_of(section)]
        blocks += [heading(section.name or "config"), paragraph(section.about)]
        blocks.append(table([*COLUMNS], rows))
    kinds = [[f"`{name}`", ", ".join(kind.reads)] for name, kind in MODELS.items()]
    blocks += [heading("Kinds of models"), paragraph(KINDS), table(["kind", "fields"], kinds)]
    return "\n\n".join(block.markdown for block in blocks) + "\n"


def main() -> None:
    """Prints the page."""
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    print(page(), end="")


if __name__ == "__main__":
    command(main)
