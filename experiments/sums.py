"""Sums of digits modulo five, "3204=4": a generated task with one right answer for each problem.

For: studies about right and wrong answers. Not for: the studies themselves.
"""

import pathlib
import random
import zlib
from collections.abc import Sequence

MODULUS = 5


def sums(count: int, terms: Sequence[int], seed: int, held_out: bool) -> list[str]:
    """`count` lines such as "3204=4"; the number of terms of each is drawn from `terms`.

    A hash of its terms decides whether a sum is held out, so training and test share no sum.
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
    """Write the sums for training to HOME/sums.txt; a study's `prepare`."""
    (home / "sums.txt").write_text(
        "\n".join(sums(300_000, terms, seed=0, held_out=False)) + "\n", "utf-8"
    )


def reordered(lines: Sequence[str]) -> list[list[str]]:
    """The sets of two or more of these sums that have the same terms in different orders."""
    sets: dict[str, list[str]] = {}
    for line in dict.fromkeys(lines):
        sets.setdefault("".join(sorted(line.partition("=")[0])), []).append(line)
    return [same for same in sets.values() if len(same) > 1]
