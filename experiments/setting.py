"""The small setting in which ablations are run, so that one can be read against another.

For: fields that several studies set: a model of width 64 on 0.5 M tokens, about a minute of one core, in which
differences under 0.02 nats mean little; and those of models that learn a task of `docs/tasks.md`. Not for: claims about
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
DENSE: dict[str, Any] = {  # the stages of configs/dense_small.py
    "model.rule": "dense",
    "model.prelude": 4,
    "model.core": 0,
    "model.coda": 0,
}
SMALL_DENSE = {"model.rule": "dense", "model.width": 48, "model.hidden": 96}  # as large as NGC of width 64, hidden 128
SHARE = 0.12  # of dense_small's parameters in matrices


def learning(steps: int) -> dict[str, Any]:
    """Fields of a model that learns a task for so many updates, measured at their end."""
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
