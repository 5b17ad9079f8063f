"""How many parameters each matrix gets: the same share, or where they lower the loss most.

For: ranks of many matrices under one budget, and which matrices share a signal. Not for: what is
kept at a rank (`methods.py`).

A budget is `kept` of the m n numbers of all matrices. `tails[i]` [k + 1], k = min(m, n), is the
predicted loss of matrix i at each rank. Rank k stands for the dense matrix: m n numbers, no loss. A
rank whose factors need m n or more is thus never chosen. Nothing here draws at random.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray
Size = tuple[int, int]  # (m, n) of a matrix, or of several that share a signal, outputs stacked
Count = Callable[[int, int, Any], Any]
ROUNDING = 1e-13  # the share of a loss that is worth no parameter
Group = tuple[Array, Size]  # the tail and size of what shares a signal


def factored(m: int, n: int, rank: Any) -> Any:
    """The numbers in two factors of rank r: r (m + n)."""
    return rank * (m + n)


def led(m: int, n: int, rank: Any) -> Any:
    """The numbers in `leaders` of rank r: r (m + n - r), which is also the dimension of W_r."""
    return rank * (m + n - rank)


COUNTS: dict[str, Count] = {"factored": factored, "led": led}


def spent(ranks: Sequence[int], sizes: Sequence[Size], count: Count = led) -> int:
    """The numbers that matrices of these ranks have; at rank min(m, n) a matrix is dense."""
    pairs = zip(ranks, sizes, strict=True)
    return sum(m * n if r == min(m, n) else int(count(m, n, r)) for r, (m, n) in pairs)


def uniform(sizes: Sequence[Size], kept: float, count: Count = led) -> list[int]:
    """The greatest rank of each matrix within `kept` of its own numbers."""
    empty = [np.zeros(min(size) + 1) for size in sizes]
    choices = [_choices(tail, size, count) for tail, size in zip(empty, sizes, strict=True)]
    shares = [kept * m * n for m, n in sizes]
    return [
        int(choice.ranks[choice.costs <= share + 1e-6][-1])
        for choice, share in zip(choices, shares, strict=True)
    ]


def greedy(
    tails: Sequence[Array], sizes: Sequence[Size], kept: float, count: Count = factored
) -> list[int]:
    """Takes away the components of least loss per number until the budget is met.

    The allocation of IO-SVD (arXiv 2605.15626): one sorted list of all components of the model. A
    component is priced m + n. A matrix whose factors would not be smaller than it stays dense.
    """
    worths = [-np.diff(tail) / sum(size) for tail, size in zip(tails, sizes, strict=True)]
    # From the last component of a matrix on: it never goes after one that comes before it.
    keys = np.concatenate([np.maximum.accumulate(worth[::-1]) for worth in worths])
    saved = []
    for m, n in sizes:
        each = np.minimum(count(m, n, np.arange(min(m, n) + 1)), m * n)
        each[-1] = m * n
        saved.append((each[1:] - each[:-1])[::-1])
    owners = np.repeat(np.arange(len(sizes)), [len(worth) for worth in worths])
    order = np.argsort(keys, kind="stable")
    left = _budget(sizes, 1.0) - np.cumsum(np.concatenate(saved)[order])
    gone = int(np.searchsorted(-left, -_budget(sizes, kept))) + 1 if kept < 1 else 0
    lost = np.bincount(owners[order[:gone]], minlength=len(sizes))
    ranks = [min(size) - int(less) for size, less in zip(sizes, lost, strict=True)]
    dense = [count(m, n, r) >= m * n for r, (m, n) in zip(ranks, sizes, strict=True)]
    return [min(size) if d else r for r, size, d in zip(ranks, sizes, dense, strict=True)]


def by_price(
    tails: Sequence[Array], sizes: Sequence[Size], kept: float, count: Count = led
) -> list[int]:
    """Ranks of least total loss within the budget: sum_i tail_i(r_i) + price count_i(r_i).

    The price is found by bisection; for a price each matrix takes its true minimum over all ranks
    (with leaders it is not convex). What is left of the budget goes to the steps of most loss per
    number, then matrices exchange numbers in pairs while that helps. The loss exceeds the least one
    possible by less than what the largest gap between neighbouring choices is worth.
    """
    alone = [[[group]] for group in zip(tails, sizes, strict=True)]
    return partition(alone, kept, count)[1]


def partition(
    stages: Sequence[Sequence[Sequence[Group]]], kept: float, count: Count = led
) -> tuple[list[int], list[int]]:
    """Which outputs share a signal, and ranks: (the candidate of each stage, ranks of its groups).

    stages[s][c] is a candidate: its groups, each with the tail of its stacked problem and its size.
    All candidates of a stage have the same m n in sum: q, k, v have 5 partitions, gate and up 2.
    At one price a stage takes the candidate of least loss + price * numbers. Ranks are listed stage
    by stage, in the order of the groups of the chosen candidate.

    Raises: ValueError if `kept` is not above 0, or candidates of a stage differ in size.
    """
    for place, stage in enumerate(stages):
        if len({_budget([size for _, size in groups], 1.0) for groups in stage}) != 1:
            raise ValueError(f"stages[{place}]: candidates must be of the same m n in sum")
    if not kept > 0:
        raise ValueError(f"kept={kept}: must be above 0")
    built = [
        [[_choices(*group, count) for group in groups] for groups in stage] for stage in stages
    ]
    budget = _budget([size for stage in stages for _, size in stage[0]], kept)

    def chosen(price: float) -> tuple[list[int], list[int]]:
        taken, places = [], []
        for stage in built:
            best = [
                [int(np.argmin(c.losses + price * c.costs)) for c in groups] for groups in stage
            ]
            bills = [
                sum(c.losses[p] + price * c.costs[p] for c, p in zip(groups, ps, strict=True))
                for groups, ps in zip(stage, best, strict=True)
            ]
            taken.append(int(np.argmin(bills)))
            places += best[taken[-1]]
        return taken, places

    def flat(taken: list[int]) -> list["_Choices"]:
        return [c for stage, which in zip(built, taken, strict=True) for c in stage[which]]

    def fits(price: float) -> bool:
        taken, places = chosen(price)
        return sum(c.costs[p] for c, p in zip(flat(taken), places, strict=True)) <= budget

    # One number never saves more than all of a loss. Losses are not told apart below 1e-40, and of
    # choices without a loss the one of fewest numbers is taken.
    high = 2 * max(c.losses[0] for stage in built for groups in stage for c in groups)
    low = 1e-40 * high
    if fits(low):
        high = low
    while low < (middle := np.sqrt(low) * np.sqrt(high)) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    taken, places = chosen(high)
    choices = flat(taken)
    _fill(choices, places, budget)
    return taken, [int(c.ranks[p]) for c, p in zip(choices, places, strict=True)]


class _Choices(NamedTuple):
    """The ranks that a matrix may have, in rising order; numbers rise with them, losses fall."""

    ranks: Array
    costs: Array
    losses: Array


def _choices(tail: Array, size: Size, count: Count) -> _Choices:
    m, n = size
    if np.shape(tail) != (min(size) + 1,):
        raise ValueError(f"tail of {np.shape(tail)} numbers: a matrix {size} has {min(size) + 1}")
    ranks = np.arange(min(size) + 1)
    costs = np.asarray(count(m, n, ranks), np.float64)
    costs[-1] = m * n
    losses = np.minimum.accumulate(np.asarray(tail, np.float64))
    losses[(losses < ROUNDING * losses[0]) | (ranks == min(size))] = 0.0
    useful = (costs < m * n) | (ranks == min(size))
    return _Choices(ranks[useful], costs[useful], losses[useful])


def _budget(sizes: Sequence[Size], kept: float) -> float:
    return kept * sum(m * n for m, n in sizes) + 1e-6


def _fill(choices: list[_Choices], places: list[int], budget: float) -> None:
    """Spends what is left of the budget, in `places`: greedy steps up, then exchanges of pairs."""
    used = sum(c.costs[p] for c, p in zip(choices, places, strict=True))
    for _ in range(3):
        used = _climb(choices, places, budget, used)
        before = list(places)
        used = _exchange(choices, places, budget, used)
        if places == before:
            break


def _climb(choices: list[_Choices], places: list[int], budget: float, used: float) -> float:
    def step(i: int) -> tuple[float, int]:
        """(the most loss per number that matrix i can save within what is left, the choice)."""
        c, p = choices[i], places[i]
        end = int(np.searchsorted(c.costs, c.costs[p] + budget - used, side="right"))
        if end <= p + 1:
            return 0.0, p
        gains = (c.losses[p] - c.losses[p + 1 : end]) / (c.costs[p + 1 : end] - c.costs[p])
        return float(gains.max()), p + 1 + int(gains.argmax())

    while True:
        steps = [step(i) for i in range(len(choices))]
        best = int(np.argmax([gain for gain, _ in steps])) if steps else 0
        if not steps or steps[best][0] <= 0:
            return used
        used += choices[best].costs[steps[best][1]] - choices[best].costs[places[best]]
        places[best] = steps[best][1]


def _exchange(choices: list[_Choices], places: list[int], budget: float, used: float) -> float:
    """For each pair, the two choices of least loss within what the pair has and what is left."""
    for i in range(len(choices)):
        for j in range(i + 1, len(choices)):
            a, b = choices[i], choices[j]
            purse = budget - used + a.costs[places[i]] + b.costs[places[j]]
            room = np.searchsorted(b.costs, purse - a.costs, side="right") - 1
            losses = np.where(room < 0, np.inf, a.losses + b.losses[room])
            best = int(losses.argmin())
            now = a.losses[places[i]] + b.losses[places[j]]
            if losses[best] < now * (1 - 1e-9):
                places[i], places[j] = best, int(room[best])
                used = budget - purse + a.costs[best] + b.costs[places[j]]
    return used
