"""What generated text and answers are like: how varied, how repetitive, how consistent; and how
attention differs.

For: the measures by which the encapsulation work (arXiv 2502.07124) compares models, as small
functions on what was generated or measured. Its abstract names the measures and gives no formulas;
each here says whose it is. Not for: generating, or held-out loss.
"""

import itertools
import re
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import scipy.special


def words(text: str) -> list[str]:
    """Words and marks of punctuation, in order, as they stand in prose or in code."""
    return re.findall(r"\w+|[^\w\s]", text)


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """distinct-n, in [0, 1]: different n-grams as a share of all, over all texts together (arXiv
    1510.03055).

    It falls as texts grow: compare at equal lengths. nan where no text has n words.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def type_token_ratio(text: Sequence[Hashable]) -> float:
    """Different words of one text as a share of all its words, in (0, 1]; it falls as the text
    grows.
    """
    return distinct([text], 1)


def repetition(text: Sequence[Hashable], n: int) -> float:
    """seq-rep-n, in [0, 1): the share of a text's n-grams that were there before (arXiv
    1908.04319).
    """
    return 1 - distinct([text], n)


def agreement(answers: Iterable[Iterable[Hashable]]) -> float:
    """How often two prompts that ask the same are answered alike, right or wrong: mean over sets of
    two or more.
    """
    pairs = (list(itertools.combinations(same, 2)) for same in answers)
    return float(np.mean([np.mean([a == b for a, b in of_set]) for of_set in pairs]))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence (Lin 1991, doi 10.1109/18.61115) of distributions [..., S]: [...],
    0 to 1 bit.
    """
    middle = (p + q) / 2
    nats = scipy.special.rel_entr(p, middle) + scipy.special.rel_entr(q, middle)
    return np.sum(nats, axis=-1) / (2 * np.log(2))


def attention_divergence(stages: Sequence[np.ndarray]) -> float:
    """How differently stages that follow one another look back: mean `divergence` of their
    attention, in bits.

    stages: of each, how much tokens heed each other [B, H, T, T]. Heads of two stages have nothing
    to do with each other, so they are averaged first. A sequence's first token, which has itself
    alone to heed, is left out.
    """
    looks = [np.asarray(shares, np.float64).mean(axis=1)[:, 1:] for shares in stages]
    return float(np.mean([divergence(p, q) for p, q in itertools.pairwise(looks)]))
