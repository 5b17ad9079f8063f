"""Which corpora `config.data` names, mixed or alone, and the text to learn byte pairs on.

For: `Mixed`. Not for: their tokens (`token_files.py`), or tokenizers (`tokenizer.py`).
"""

import hashlib
import os
import pathlib
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

from ngc_jax.data import corpus, sources, texts
from ngc_jax.runtime import files
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.metrics import Advance

LEARN = 1 << 28  # bytes that byte pairs are learned on at most
LINE = 1 << 12  # bytes of a word without spaces of which byte pairs are learned at most
WEIGHTED = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")


class Mixed(NamedTuple):
    """The corpora of a run in their order, and the share of each."""

    parts: list[corpus.Corpus]
    shares: list[Fraction]

    @property
    def fingerprint(self) -> str:
        """Of all texts, whatever their shares."""
        if len(self.parts) == 1:
            return self.parts[0].fingerprint
        whole = "".join(part.fingerprint for part in self.parts)
        return hashlib.sha256(whole.encode()).hexdigest()

    @property
    def summary(self) -> str:
        """What the log says of all parts."""
        if len(self.parts) == 1:
            return self.parts[0].summary
        told = zip(self.shares, self.parts, strict=True)
        return "; ".join(f"{float(share):.4g} of {part.summary}" for share, part in told)


def open_corpora(config: Any, home: pathlib.Path) -> Mixed:
    """The corpora that `config.data` names. Raises UserError if one is missing or unreadable."""
    if config.path and config.tfds_name:
        both = f"data.path={config.path!r} and data.tfds_name={config.tfds_name!r}"
        raise UserError(f"{both} are both set: give one of them")
    if config.tfds_name:
        return Mixed([corpus.prepared(config)], [Fraction(1)])
    if not config.path:
        return Mixed([corpus.library(home)], [Fraction(1)])
    found = [WEIGHTED.fullmatch(part.strip()) for part in config.path.split(",")]
    if os.path.lexists(files.expand(config.path)) or not all(found):
        return Mixed([texts.text_corpus(config, config.path, home)], [Fraction(1)])
    weights = [Fraction(part[2]) for part in found if part]
    if not min(weights):
        raise UserError(f"data.path={config.path!r}: weights must be above 0, such as 'a.txt:0.7'")
    parts = [texts.text_corpus(config, part[1], home) for part in found if part]
    return Mixed(parts, [weight / sum(weights) for weight in weights])


def sample(mixed: Mixed) -> Iterator[str]:
    """The text to learn byte pairs on: of all that is trained on, at most LEARN, evenly spread."""
    size = sum(part.size for part in mixed.parts)
    advance, every, number = Advance("learning byte pairs from", size), max(1, -(-size // LEARN)), 0
    for part in mixed.parts:
        for split, pieces in part.read():
            for piece in sources.cut(pieces) if split == "train" else ():
                advance.add(len(piece))
                number += 1
                if number % every == 0:
                    yield from (line.decode() for line in sources.cut([piece], LINE))
