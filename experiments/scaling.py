"""How does NGC's distance from dense move with width and with training?

Three widths of dense at 1,000 updates, and three lengths at width 128, each with a schedule of its own. Beside dense
stand dense and NGC with 0.32 of its parameters in matrices, NGC in eight groups, about sqrt(D / 2). Learning rates are
those chosen at width 128 for 1,000 updates.

    python -m experiments.run scaling
"""

from typing import Any

from experiments.setting import DENSE
from experiments.study import Study
from experiments.sweeps import Sweep, Variant, seeds

POINTS = ((64, 1000), (128, 1000), (192, 1000), (128, 125), (128, 500))  # widths, updates
SHARE = 0.319  # 0.32 cannot be met to 1% at width 64
FULL = {**DENSE, "model.wiring": "complete"}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"rate": 1e-2},
    "dense, as large": {**FULL, "model.groups": 4, "rate": 1e-2},
    "dense": {**FULL, "rate": 5e-3},
}


def fields(model: str, width: int, steps: int) -> dict[str, Any]:
    """One point's fields."""
    sizes: dict[str, Any] = {"model.width": width, "model.hidden": 3 * width}
    if model != "dense":
        sizes |= {"model.match": f"dense_small:{SHARE * (width / 128) ** 2:g}"}
    return {**sizes, **MODELS[model], "train.steps": steps, "train.warmup_steps": steps // 10}


STUDY = Study(
    sweep=Sweep(
        Variant({"model": model, "width": f"width {width}", "updates": f"{steps} updates"}, fields(model, width, steps))
        for width, steps in POINTS
        for model in MODELS
    )
    * seeds(3),
    config="ngc_small",
    common={"stability.every": 0},
    baseline={"model": "dense"},
)
