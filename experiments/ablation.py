"""Which part of NGC matters: groups, blocks within them, ports between them, activation, sharing or rounds?

One factor at a time, and pairs of the two that matter most at ngc_small, all at its share of dense_small's parameters:
the width takes up what a change saves. Learning rate as shipped.

    python -m experiments.run ablation
"""

from typing import Any

from experiments.study import Study
from experiments.sweeps import cases, seeds

CHANGES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "4 groups": {"model.groups": 4},
    "16 groups": {"model.groups": 16, "model.match": "dense_small:0.307"},
    "no block within groups": {"model.p_intra": 0},
    "4 numbers within groups": {"model.p_intra": 4},
    "ports of 1": {"model.p_inter": 1},
    "ports of 6": {"model.p_inter": 6},
    "no ports": {"model.rule": "none"},
    "silu on the signals": {"model.message_activation": "silu"},
    "qkv shared": {"model.sharing": "qkv"},
    "1 round": {"model.rounds": 1},
    "4 rounds": {"model.rounds": 4},
    "4 groups, ports of 6": {"model.groups": 4, "model.p_inter": 6},
    "16 groups, ports of 1": {"model.groups": 16, "model.p_inter": 1},
    "4 groups, ports of 1": {"model.groups": 4, "model.p_inter": 1},
}
STUDY = Study(
    sweep=cases("change", CHANGES) * seeds(3),
    common={"model.match": "dense_small:0.31", "train.steps": 500, "stability.every": 0, "rate": 1e-2},
    baseline={"change": "as shipped"},
)
