"""The statistics of studies: means with intervals over seeds, paired differences, AUROC.

For: small functions of measured numbers. Not for: intervals over blocks of one run
(`ngc_jax.stability`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # scipy.stats is imported where it is used


def interval(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± half width` of the 95% interval of the mean of independent values (Student's t).

    A single value stands alone; "-" stands for none.
    """
    if not values:
        return "-"
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean of two or more values."""
    reach = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(reach * statistics.stdev(values) / math.sqrt(len(values)))


class Paired(NamedTuple):
    """Differences between two groups, seed by seed."""

    differences: list[float]
    p: float  # of the paired t test, two-sided; nan for fewer than two pairs

    def __str__(self) -> str:
        return interval(self.differences, 4)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired:
    """values - others, for the seeds that both have."""
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return Paired(differences, math.nan)
    if statistics.stdev(differences) == 0:  # the test divides by it
        return Paired(differences, float(statistics.mean(differences) == 0))
    return Paired(differences, float(scipy.stats.ttest_1samp(differences, 0).pvalue))


def ratio(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    """values / others, for the seeds that both have: their mean, with its interval."""
    return interval([values[seed] / others[seed] for seed in values if seed in others], 4)


def adjusted(chances: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for the number of comparisons (Holm 1979); nan stays nan."""
    ordered = sorted((p, name) for name, p in chances.items() if math.isfinite(p))
    found, least = dict.fromkeys(chances, math.nan), 0.0
    for rank, (p, name) in enumerate(ordered):
        least = max(least, min(1.0, p * (len(ordered) - rank)))
        found[name] = least
    return found


def p_value(p: float) -> str:
    """A p value to three digits, "< 0.001" below them, "" for nan."""
    if math.isnan(p):
        return ""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def auroc(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray) -> float:
    """The probability that a value of the first kind is above one of the second; ties count half.

    0.5: the value does not separate the kinds.
    """
    a, b = np.asarray(above)[:, None], np.asarray(below)[None, :]
    return float(np.mean((a > b) + 0.5 * (a == b)))
