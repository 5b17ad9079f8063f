"""Measures of generated text, answers and attention: variety, repetition, agreement, divergence.

For: the measures of the encapsulation work (arXiv 2502.07124), as small functions. Its abstract
names the measures without formulas; each function here states its source. Not for: generating, or
held-out loss.
"""

import itertools
import re
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import scipy  # scipy.special is imported where it is used


def words(text: str) -> list[str]:
    """Words and marks of punctuation, in order, of prose or code."""
    return re.findall(r"\w+|[^\w\s]", text)


def distinct(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """distinct-n: different n-grams as a fraction of all n-grams of all texts, in [0, 1].

    It falls with the length of texts: compare equal lengths. nan if no text has n words. Source:
    arXiv 1510.03055.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def type_token_ratio(text: Sequence[Hashable]) -> float:
    """Different words of a text as a fraction of its words, in (0, 1]; it falls with length."""
    return distinct([text], 1)


def repetition(text: Sequence[Hashable], n: int) -> float:
    """seq-rep-n: the fraction of a text's n-grams that occurred before, in [0, 1).

    Source: arXiv 1908.04319.
    """
    return 1 - distinct([text], n)


def agreement(answers: Iterable[Iterable[Hashable]]) -> float:
    """The fraction of pairs of equivalent prompts with equal answers, right or wrong: mean over
    sets of two or more.
    """
    pairs = (list(itertools.combinations(same, 2)) for same in answers)
    return float(np.mean([np.mean([a == b for a, b in of_set]) for of_set in pairs]))


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of distributions [..., S]: [...], from 0 to 1 bit.

    Source: Lin 1991, doi 10.1109/18.61115.
    """
    middle = (p + q) / 2
    nats = scipy.special.rel_entr(p, middle) + scipy.special.rel_entr(q, middle)
    return np.sum(nats, axis=-1) / (2 * np.log(2))


def attention_divergence(stages: Sequence[np.ndarray]) -> float:
    """Mean `divergence` between the attention of successive stages, in bits.

    stages: attention weights of each, [B, H, T, T]. Heads of two stages do not correspond, so they
    are averaged first. A sequence's first token is left out: it attends to itself only.
    """
    means = [np.asarray(weights, np.float64).mean(axis=1)[:, 1:] for weights in stages]
    return float(np.mean([divergence(p, q) for p, q in itertools.pairwise(means)]))
