"""The statistics that studies report: a mean with its interval over seeds, paired differences, and
how well a number tells two kinds apart.

For: small functions on numbers already measured. Not for: intervals over blocks of one run
(`ngc_jax.stability`).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


def interval(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± half width` of the 95% interval of a mean of independent values (Student's t); of
    one, it alone.
    """
    if not values:
        return "-"
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{statistics.fmean(values):.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {half_width(values):.{digits}f}"


def half_width(values: Sequence[float]) -> float:
    """Of the 95% interval of the mean of two values or more."""
    reach = scipy.stats.t.ppf(0.975, len(values) - 1)
    return float(reach * statistics.stdev(values) / math.sqrt(len(values)))


class Paired(NamedTuple):
    """Differences of two kinds of runs, seed by seed."""

    differences: list[float]
    p: float  # of the paired t test, two-sided; nan of fewer than two pairs

    def __str__(self) -> str:
        return interval(self.differences, 4)


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired:
    """values - others at the seeds that both have."""
    differences = [values[seed] - others[seed] for seed in values if seed in others]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return Paired(differences, math.nan)
    if statistics.stdev(differences) == 0:  # the test divides by it
        return Paired(differences, float(statistics.mean(differences) == 0))
    return Paired(differences, float(scipy.stats.ttest_1samp(differences, 0).pvalue))


def ratio(values: Mapping[int, float], others: Mapping[int, float]) -> str:
    """values / others at the seeds that both have: their mean, with its interval."""
    return interval([values[seed] / others[seed] for seed in values if seed in others], 4)


def adjusted(chances: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number by Holm's method (1979), so that the chance of one false
    find stays.
    """
    ordered = sorted((p, name) for name, p in chances.items() if math.isfinite(p))
    found, least = dict.fromkeys(chances, math.nan), 0.0
    for rank, (p, name) in enumerate(ordered):
        least = max(least, min(1.0, p * (len(ordered) - rank)))
        found[name] = least
    return found


def auroc(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray) -> float:
    """How often a value of the first kind ranks above one of the second, ties half: 0.5 says
    nothing.
    """
    a, b = np.asarray(above)[:, None], np.asarray(below)[None, :]
    return float(np.mean((a > b) + 0.5 * (a == b)))
