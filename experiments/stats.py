"""The statistics that studies report: a mean with its interval over seeds, and how well a number tells two kinds apart.

For: small functions on numbers already measured. Not for: intervals over blocks of one run (`ngc_jax.stability`).
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import scipy.stats


def interval(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± half width` of the 95% interval of a mean of independent values (Student's t)."""
    reach = scipy.stats.t.ppf(0.975, len(values) - 1)
    half = reach * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


def auroc(above: Sequence[float] | np.ndarray, below: Sequence[float] | np.ndarray) -> float:
    """How often a value of the first kind ranks above one of the second, ties half: 0.5 says nothing."""
    a, b = np.asarray(above)[:, None], np.asarray(below)[None, :]
    return float(np.mean((a > b) + 0.5 * (a == b)))
