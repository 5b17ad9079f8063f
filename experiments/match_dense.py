"""Is ngc_small as good as dense_small?

The question of the README's table: the same steps, the same tuning budget on both sides (learning rates a factor of two
apart, at four fifths of the length, with a seed that is not used again), then three seeds each at full length.

    python -m experiments.run match_dense
"""

import math
import statistics
from typing import Any

from experiments.blocks import Block, Table
from experiments.setting import DENSE
from experiments.stats import interval
from experiments.study import LOSS, Results, Study
from experiments.sweeps import cases, seeds

MODELS: dict[str, dict[str, Any]] = {
    "dense_small": {**DENSE, "rate": (1.25e-3, 2.5e-3, 5e-3, 1e-2)},
    "ngc_small": {"rate": (2.5e-3, 5e-3, 1e-2, 2e-2)},
}


def answer(results: Results) -> list[Block]:
    """Bits per byte, and the ratio of the losses, paired by seed."""
    found = {group.name: results.of(group, LOSS) for group in results.groups}
    both = [seed for seed in found["ngc_small"] if seed in found["dense_small"]]
    ratios = [found["ngc_small"][seed] / found["dense_small"][seed] for seed in both]
    bits = {f"{name}, bits per byte": statistics.mean(of.values()) / math.log(2) for name, of in found.items()}
    rows = [[name, f"{value:.4f}"] for name, value in bits.items()]
    return [Table(["", ""], [*rows, ["ngc_small / dense_small, paired by seed", interval(ratios, 4)]])]


STUDY = Study(sweep=cases("config", MODELS) * seeds(3), tuning=0.8, baseline={"config": "dense_small"}, answer=answer)
