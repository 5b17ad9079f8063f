"""Sums of digits modulo five, "3204=4": a task that is made, not collected, and has one right
answer.

For: studies that ask when a model is right. Not for: the studies.
"""

import pathlib
import random
import zlib
from collections.abc import Sequence

MODULUS = 5


def sums(count: int, terms: Sequence[int], seed: int, held_out: bool) -> list[str]:
    """Lines "3204=4", each of as many terms as is drawn from `terms`.

    A sum is held out, or never, by a hash of its terms: the two sides share none.
    """
    draw = random.Random(seed)
    lines: list[str] = []
    while len(lines) < count:
        digits = [draw.randrange(MODULUS) for _ in range(draw.choice(terms))]
        asked = "".join(map(str, digits))
        if (zlib.crc32(asked.encode()) % 10 == 0) == held_out:
            lines.append(f"{asked}={sum(digits) % MODULUS}")
    return lines


def keep(home: pathlib.Path, terms: Sequence[int]) -> None:
    """Write the sums that are learned to HOME/sums.txt, for a study's `prepare`."""
    (home / "sums.txt").write_text("\n".join(sums(300_000, terms, seed=0, held_out=False)) + "\n")


def reordered(lines: Sequence[str]) -> list[list[str]]:
    """Of these sums, the sets of two or more that are the same sum with its terms in another order."""
    sets: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        sets.setdefault("".join(sorted(line.partition("=")[0])), []).append(line)
    return [same for same in sets.values() if len(same) > 1]
