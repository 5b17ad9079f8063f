"""Two functions timed in turn, since machines are shared and drift.

For: ratios measured in one run, and the seconds behind them. Not for: what is timed, or numbers
from two runs.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Paired(NamedTuple):
    """Medians over pairs: time(other) / time(plain), and the seconds of a call of each."""

    ratio: float
    plain: float
    other: float


def paired(
    plain: Callable[..., Any], other: Callable[..., Any], *args: Any, pairs: int = 9, calls: int = 1
) -> Paired:
    """Call both on `args` once, then time `calls` calls of one after as many of the other, `pairs`
    times.
    """

    def took(function: Callable[..., Any]) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(function(*args))
        return (time.perf_counter() - began) / calls

    for function in (plain, other):
        jax.block_until_ready(function(*args))
    times = [(took(plain), took(other)) for _ in range(pairs)]
    firsts, seconds = zip(*times, strict=True)
    return Paired(
        statistics.median(b / a for a, b in times),
        statistics.median(firsts),
        statistics.median(seconds),
    )
