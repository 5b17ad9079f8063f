"""The small setting in which ablations are run, so that one can be read against another.

For: fields that several studies set: a model of width 64 on 0.5 M tokens, about a minute of one core, in which
differences under 0.02 nats mean little. Not for: claims about larger models (`scaling.py`).
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
SHARE = 0.12  # of dense_small's parameters in matrices
