"""How does NGC's distance from dense move with width and with training?

Three widths of dense at 500 updates and, at width 64, three lengths, each with a schedule of its
own. Beside dense stand dense and NGC with 0.325 of its parameters in matrices, NGC in eight groups,
about sqrt(D / 2). Learning rates are searched at each point as the comparison does (`compare.py`).

    python -m experiments.run scaling
"""

import statistics
from typing import Any

from experiments.blocks import Block, Heading, Table, Words
from experiments.figures import legend, look, picture
from experiments.protocols import PROTOCOLS
from experiments.setting import DENSE
from experiments.stats import paired, ratio
from experiments.study import LOSS, Results, Study
from experiments.sweeps import Sweep, Variant, seeds

POINTS = ((64, 250), (64, 500), (64, 2000), (128, 500), (192, 500))  # widths of dense, updates
SHARE = 0.325  # 0.32 cannot be met to 1% at width 64
FULL = {**DENSE, "model.wiring": "complete", "model.groups": 4}
MODELS: dict[str, dict[str, Any]] = {"NGC": {}, "dense, as large": FULL, "dense": FULL}


def fields(model: str, width: int, steps: int) -> dict[str, Any]:
    """One point's fields."""
    sizes: dict[str, Any] = {"model.width": width, "model.hidden": 3 * width}
    if model != "dense":
        sizes |= {"model.match": f"dense_small:{SHARE * (width / 128) ** 2:g}"}
    return {**sizes, **MODELS[model], "train.steps": steps, "train.warmup_steps": steps // 10}


def distances(results: Results) -> list[Block]:
    """NGC beside both dense models, at each point."""
    losses = {tuple(group.labels.values()): results.of(group, LOSS) for group in results.groups}
    costs = dict(zip(losses, results.costs, strict=True))
    # tokens a parameter, mean and half the range
    rows, lines = [], dict[str, list[tuple[float, float, float]]]()
    for width, updates in dict.fromkeys((width, updates) for _, width, updates in losses):
        own, as_large, dense = (losses[model, width, updates] for model in MODELS)
        cost = costs["dense", width, updates]
        tokens = cost.config.train.steps * cost.config.train.batch_size * cost.config.data.context
        seen, less, over = tokens / cost.matrices, paired(own, as_large), ratio(own, dense)
        rows.append([width, updates, f"{seen:.1f}", str(less), over])
        for name, apart in (
            ("as large", less.differences),
            ("whole", paired(own, dense).differences),
        ):
            if apart:
                points = lines.setdefault(f"{name}, {width}", [])
                points.append((seen, statistics.mean(apart), (max(apart) - min(apart)) / 2))

    def draw(canvas: Any) -> None:
        axis = canvas.subplots()
        axis.axhline(0, color="0.6", linewidth=0.8)
        for place, (name, points) in enumerate(lines.items()):
            x, y, bars = zip(*points, strict=True)
            axis.errorbar(x, y, bars, label=name, linewidth=1, markersize=4, **look(place))
        axis.set(
            xscale="log",
            xlabel="tokens for each parameter of dense in matrices",
            ylabel=f"{LOSS}: NGC - dense",
        )
        legend(canvas, axis)

    caption = "NGC's loss less that of dense, as large or whole, by training: means, and the range over seeds."
    said = f"NGC's {LOSS} less that of dense as large, and over that of dense; paired by seed, mean and 95% interval."
    head = [
        "width",
        "updates",
        "tokens for each parameter of dense in matrices",
        "less dense as large",
        "over dense",
    ]
    return [
        Heading("NGC's distance from dense"),
        Words(said),
        Table(head, rows),
        picture("distances", caption, draw),
    ]


STUDY = Study(
    sweep=Sweep(
        Variant(
            {"model": model, "width": f"width {width}", "updates": f"{steps} updates"},
            fields(model, width, steps),
        )
        for width, steps in POINTS
        for model in MODELS
    )
    * seeds(3),
    config="ngc_small",
    common={"stability.every": 0, "rate": (5e-3, 1e-2, 2e-2)},
    tuning=PROTOCOLS["small"].tuning,
    baseline={"model": "dense"},
    answer=distances,
)
