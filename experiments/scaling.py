"""How does NGC's distance from dense move with width and with training?

Both at three widths and three lengths, each with a schedule of its own; NGC has 0.32 of dense's parameters in matrices
at each width, by its ports, in eight groups, about sqrt(D / 2). Learning rates are those chosen at width 128.

    python -m experiments.run scaling
"""

import itertools
from typing import Any

from experiments.setting import DENSE
from experiments.study import Study
from experiments.sweeps import Sweep, Variant, seeds

WIDTHS = (64, 128, 192)
LENGTHS = (125, 500, 1000)
SHARE = 0.32


def fields(model: str, width: int, steps: int) -> dict[str, Any]:
    """One point's fields."""
    both = {"model.width": width, "model.hidden": 3 * width, "train.steps": steps, "train.warmup_steps": steps // 20}
    if model == "dense":
        return {**both, **DENSE, "rate": 5e-3}
    match = f"dense_small:{SHARE * (width / 128) ** 2:g}"
    return {**both, "model.match": match, "model.match_by": "p_inter", "rate": 1e-2}


STUDY = Study(
    sweep=Sweep(
        Variant({"model": model, "width": f"width {width}", "updates": f"{steps} updates"}, fields(model, width, steps))
        for model, width, steps in itertools.product(("NGC", "dense"), WIDTHS, LENGTHS)
    )
    * seeds(3),
    common={"stability.every": 0},
    baseline={"model": "dense"},
)
