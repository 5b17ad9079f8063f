"""The small setting of the ablations, the same for all, so that their results are comparable.

For: fields that several studies use: a model of width 64 on 0.5 M tokens, about a minute on one
core, where differences below 0.02 nats mean little; models that learn a task of `docs/tasks.md`;
and larger versions of both for an accelerator (`--larger`; not run yet). Not for: statements about
larger models (`scaling.py`).
"""

from typing import Any

STEPS = 500
COMMON: dict[str, Any] = {
    "data.context": 64,
    "model.width": 64,
    "model.hidden": 192,
    "train.steps": STEPS,
    "train.warmup_steps": STEPS // 10,
    "eval.every": STEPS // 4,
    "checkpoint.every_steps": STEPS,
    "stability.every": 0,
}
LONGER: dict[str, Any] = {  # for an accelerator: 80 M tokens
    "data.context": 256,
    "train.steps": 10 * STEPS,
    "train.warmup_steps": STEPS,
    "train.batch_size": 64,
    "train.compute_dtype": "bfloat16",
    "eval.every": 2 * STEPS,
    "checkpoint.every_steps": 2 * STEPS,
}
LARGER = {**LONGER, "model.width": 256, "model.hidden": 768}
DENSE: dict[str, Any] = {  # stages as in configs/dense_small.py
    "model.rule": "dense",
    "model.prelude": 4,
    "model.core": 0,
    "model.coda": 0,
}
# as many parameters as NGC of width 64, hidden 128
SMALL_DENSE = {"model.rule": "dense", "model.width": 48, "model.hidden": 96}
SHARE = "dense_small:0.12"  # fraction of its parameters in matrices
LARGER_SHARE = {**LARGER, "model.match": "dense_small:1.92"}  # the same at four times the width
LARGER_TASK = {"data.problems": 1_000_000, "train.batch_size": 512}


def learning(steps: int) -> dict[str, Any]:
    """Fields of a model that learns a task for `steps` updates, with one evaluation at the end."""
    return {
        "data.problems": 50_000,
        "model.groups": 4,
        "model.heads": 4,
        "model.coda": 0,
        "train.steps": steps,
        "train.batch_size": 64,
        "eval.every": steps,
        "checkpoint.every_steps": steps,
        "stability.every": 0,
    }
