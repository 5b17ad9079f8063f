"""How does NGC's distance from dense move with width and with training?

Three widths of dense at 500 updates and, at width 64, three lengths, each with a schedule of its own. Beside dense
stand dense and NGC with 0.325 of its parameters in matrices, NGC in eight groups, about sqrt(D / 2). Learning rates are
searched at each point as the comparison does (`compare.py`).

    python -m experiments.run scaling
"""

from typing import Any

from experiments.blocks import Block, Heading, Table, Words
from experiments.protocols import PROTOCOLS
from experiments.setting import DENSE
from experiments.stats import paired, ratio
from experiments.study import LOSS, Results, Study
from experiments.sweeps import Sweep, Variant, seeds

POINTS = ((64, 250), (64, 500), (64, 2000), (128, 500), (192, 500))  # widths of dense, updates
SHARE = 0.325  # 0.32 cannot be met to 1% at width 64
RATES = (5e-3, 1e-2, 2e-2)
FULL = {**DENSE, "model.wiring": "complete", "model.groups": 4}
MODELS: dict[str, dict[str, Any]] = {"NGC": {}, "dense, as large": FULL, "dense": FULL}


def fields(model: str, width: int, steps: int) -> dict[str, Any]:
    """One point's fields."""
    sizes: dict[str, Any] = {"model.width": width, "model.hidden": 3 * width}
    if model != "dense":
        sizes |= {"model.match": f"dense_small:{SHARE * (width / 128) ** 2:g}"}
    return {**sizes, **MODELS[model], "rate": RATES, "train.steps": steps, "train.warmup_steps": steps // 10}


def distances(results: Results) -> list[Block]:
    """NGC beside both dense models, at each point."""
    losses = {tuple(group.labels.values()): results.of(group, LOSS) for group in results.groups}
    costs = dict(zip(losses, results.costs, strict=True))
    rows = []
    for width, updates in dict.fromkeys((width, updates) for _, width, updates in losses):
        own, as_large, dense = (losses[model, width, updates] for model in MODELS)
        cost = costs["dense", width, updates]
        tokens = cost.config.train.steps * cost.config.train.batch_size * cost.config.data.context
        less, over = str(paired(own, as_large)), ratio(own, dense)
        rows.append([width, updates, f"{tokens / cost.matrices:.1f}", less, over])
    said = f"NGC's {LOSS} less that of dense as large, and over that of dense; paired by seed, mean and 95% interval."
    head = ["width", "updates", "tokens for each parameter of dense in matrices", "less dense as large", "over dense"]
    return [Heading("NGC's distance from dense"), Words(said), Table(head, rows)]


STUDY = Study(
    sweep=Sweep(
        Variant({"model": model, "width": f"width {width}", "updates": f"{steps} updates"}, fields(model, width, steps))
        for width, steps in POINTS
        for model in MODELS
    )
    * seeds(3),
    config="ngc_small",
    common={"stability.every": 0},
    tuning=PROTOCOLS["small"].tuning,
    baseline={"model": "dense"},
    answer=distances,
)
