"""The cost of an update relative to another model's: time, measured alternately on one machine, and
memory.

For: ratios. Not for: absolute speed, which depends on the machine (`launch.py` logs it).
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from ngc_jax.training.timing import paired, update_of, zeros_of


class Overhead(NamedTuple):
    """Of an update."""

    time: float  # as a multiple of the reference's
    memory: float  # peak, as a multiple of the reference's
    peak: int  # bytes, as compiled


def overhead(reference: ConfigDict, configs: Iterable[ConfigDict]) -> Iterator[Overhead]:
    """The overhead of each config over the reference, for equal batches: the median of pairs."""
    plain, least = update_of(reference)
    batch = zeros_of(reference)
    for config in configs:
        update, peak = update_of(config)
        yield Overhead(paired(plain, update, batch).ratio, peak / least, peak)
