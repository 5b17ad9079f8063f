"""Does NGC's lead last? NGC and dense, with and without delays, at three lengths of training.

Dense of width 40 has as many parameters in matrices as NGC of width 64, 69,760 and 68,976. Delays
are given to both: a lead over a dense model without them may be no lead of NGC. Learning rates are
searched at each length, as in the comparison (`compare.py`).

    python -m experiments.run lead
    python -m experiments.run lead --index=10 --count=15  # one group of runs: NGC, 8,000 updates

results/lead/tries.md tells what was tried, with figures.
"""

import statistics
from typing import Any

from experiments.protocols import PROTOCOLS
from experiments.setting import DENSE
from experiments.stats import paired
from experiments.study import LOSS, Results, Study
from experiments.sweeps import Sweep, Variant, seeds
from ngc_jax.report.blocks import Block, heading, paragraph, table

LENGTHS = (500, 2000, 8000)  # updates
NGC = {"model.width": 64, "model.hidden": 168}
FULL = {**DENSE, "model.wiring": "complete", "model.groups": 4}
FULL |= {"model.width": 40, "model.hidden": 92}
LATE = {"model.delays": "0,1", "model.form": "signals"}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": NGC,
    "NGC, delays": NGC | LATE,
    "NGC, all late": NGC | LATE | {"model.delays": "1"},
    "dense": FULL,
    "dense, delays": FULL | {"model.delays": "0,1"},
}


def leads(results: Results) -> list[Block]:
    """How far NGC with delays is ahead, of both dense models and of NGC, at each length."""
    losses = {
        (group.labels["model"], int(group.labels["updates"].split()[0].replace(",", ""))): (
            results.of(group, LOSS)
        )
        for group in results.groups
    }
    rows, mean = [], dict[tuple[str, int], float]()
    for other in ("dense, delays", "dense", "NGC", "NGC, all late"):
        row: list[Any] = [other]
        for steps in LENGTHS:
            ahead = paired(losses[other, steps], losses["NGC, delays", steps])
            row.append(str(ahead))
            if ahead.differences:
                mean[other, steps] = statistics.mean(ahead.differences)
        # The last two lengths are two doublings apart.
        ends = [mean[other, steps] for steps in LENGTHS[1:] if (other, steps) in mean]
        row.append(f"{(ends[0] - ends[1]) / 2:+.4f}" if len(ends) == 2 else "")
        rows.append(row)
    head = ["ahead of", *(f"{steps:,} updates" for steps in LENGTHS), "lost per doubling, at last"]
    said = (
        f"{LOSS} of another model minus that of NGC with delays, paired by seed: mean and 95% "
        "interval. Above 0 NGC with delays is better."
    )
    return [heading("NGC with delays"), paragraph(said), table(head, rows)]


STUDY = Study(
    sweep=Sweep(
        Variant(
            {"model": model, "updates": f"{steps:,} updates"},
            {**fields, "train.steps": steps, "train.warmup_steps": steps // 10},
        )
        for steps in LENGTHS
        for model, fields in MODELS.items()
    )
    * seeds(3),
    config="ngc_small",
    common={"stability.every": 0, "rate": (1e-2, 2e-2, 4e-2)},
    tuning=PROTOCOLS["small"].tuning,
    baseline={"model": "dense, delays"},
    legend={
        "delays": "every other port, or channel that a matrix reads, is heard a token late",
        "all late": "no group hears another within a token",
        "difference": f"{LOSS}, minus that of dense with delays of the same length; paired by seed",
    },
    answer=leads,
)
