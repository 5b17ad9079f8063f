"""How does the difference between NGC and dense change with width and with training?

Three widths of a dense model at 500 updates and, at width 64, three lengths, each with its own
schedule. At each point there is also a dense model and an NGC model with 0.325 of its parameters in
matrices. NGC has eight groups, about sqrt(width / 2). Learning rates are searched at each point, as
in the comparison (`compare.py`).

    python -m experiments.run scaling
"""

import statistics
from typing import Any

from experiments.figures import legend, looks, name_looks
from experiments.protocols import PROTOCOLS
from experiments.setting import DENSE
from experiments.stats import paired, ratio
from experiments.study import LOSS, Group, Results, Study
from experiments.sweeps import Sweep, Variant, seeds
from ngc_jax.report.blocks import Block, heading, paragraph, table
from ngc_jax.report.figures import figure

POINTS = ((64, 250), (64, 500), (64, 2000), (128, 500), (192, 500))  # width of dense, updates
SHARE = 0.325  # of the parameters; at width 64, no sizes come within 1% of 0.32
FULL = {**DENSE, "model.wiring": "complete", "model.groups": 4}
MODELS: dict[str, dict[str, Any]] = {"NGC": {}, "dense, as large": FULL, "dense": FULL}
SEEN = "training tokens per parameter in matrices of dense"


def fields(model: str, width: int, steps: int) -> dict[str, Any]:
    """The fields of a model at one point."""
    sizes: dict[str, Any] = {"model.width": width, "model.hidden": 3 * width}
    if model != "dense":
        sizes |= {"model.match": f"dense_small:{SHARE * (width / 128) ** 2:g}"}
    return {**sizes, **MODELS[model], "train.steps": steps, "train.warmup_steps": steps // 10}


def distances(results: Results) -> list[Block]:
    """NGC beside both dense models, at each point."""
    groups = {tuple(group.labels.values()): group for group in results.groups}
    losses = {labels: results.of(group, LOSS) for labels, group in groups.items()}
    costs = dict(zip(groups, results.costs, strict=True))
    rows = []
    # (model, width) -> tokens per parameter, differences and group of each point
    lines: dict[tuple[str, str], list[tuple[float, list[float], Group]]] = {}
    for width, updates in dict.fromkeys((width, updates) for _, width, updates in losses):
        own, small, full = (losses[model, width, updates] for model in MODELS)
        cost = costs["dense", width, updates]
        tokens = cost.config.train.steps * cost.config.train.batch_size * cost.config.data.context
        seen, less = tokens / cost.matrices, paired(own, small)
        rows.append([width, updates, f"{seen:.1f}", str(less), ratio(own, full)])
        for name, other in (("dense, as large", less), ("dense", paired(own, full))):
            if other.differences:
                point = seen, other.differences, groups[name, width, updates]
                lines.setdefault((name, width), []).append(point)

    def draw(canvas: Any) -> None:
        axis, style = canvas.subplots(), looks(results)
        axis.axhline(0, color="0.6", linewidth=0.8)
        for points in lines.values():
            colour = style[points[0][2].name]["color"]
            means = [statistics.mean(values) for _, values, _ in points]
            axis.plot([at for at, _, _ in points], means, color=colour, linewidth=1)
            for (at, values, group), mean in zip(points, means, strict=True):
                axis.vlines(at, min(values), max(values), color=colour, linewidth=1)
                axis.plot(at, mean, **style[group.name])
        name_looks(axis, results, [group for points in lines.values() for _, _, group in points])
        axis.set(xscale="log", xlabel=SEEN, ylabel=f"difference in {LOSS}")
        axis.xaxis.set_major_formatter("{x:g}")
        legend(canvas, axis)

    caption = (
        "NGC's loss minus that of a dense model, whose colour and mark each point has. Vertical "
        f"axis: difference in nats per token; below 0 NGC is better. Horizontal axis: {SEEN}, "
        'logarithmic. The model "dense, as large" is as large as NGC. Marks: means over seeds. '
        "Bars: from the lowest to the highest seed."
    )
    said = (
        f"Difference: NGC's {LOSS} minus that of the dense model as large as NGC. Ratio: NGC's "
        "loss over that of the dense model with all parameters. Both are paired by seed: mean and "
        "95% interval."
    )
    head = ["width", "updates", SEEN, "difference from dense, as large", "ratio to dense"]
    return [
        heading("NGC beside dense"),
        paragraph(said),
        table(head, rows),
        figure("distances", caption, draw),
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
    legend={
        "model": f"dense, as large: {SHARE} of the parameters in matrices of dense, like NGC",
        "difference": f"{LOSS}, minus that of dense of the same point; paired by seed",
    },
    answer=distances,
)
