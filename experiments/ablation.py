"""Which part of NGC matters: groups, blocks, ports, wiring, activation, sharing or rounds?

One change of `ngc_small` at a time, and the best pair of changes. All models have 0.32 of the
parameters in matrices of `dense_small`: the width changes to keep that number. Rounds cost no
parameters. The learning rate is that of `ngc_small` in the comparison.

    python -m experiments.run ablation
"""

from typing import Any

from experiments.study import Study
from experiments.sweeps import cases, seeds

CHANGES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "4 groups": {"model.groups": 4},
    # the size from which the search of sizes starts
    "16 groups": {"model.groups": 16, "model.width": 160, "model.hidden": 480},
    "no block within groups": {"model.p_intra": 0, "model.wiring": "complete"},
    "4 numbers within groups": {"model.p_intra": 4},
    "ports of 1": {"model.p_inter": 1},
    "ports of 4": {"model.p_inter": 4},
    "no ports": {"model.rule": "none", "model.wiring": "complete"},
    "groups hear themselves": {"model.wiring": "complete"},
    "silu on the signals": {"model.message_activation": "silu"},
    "qkv shared": {"model.sharing": "qkv"},
    "depth2 shared": {"model.sharing": "depth2"},
    "1 round": {"model.rounds": 1},
    "3 rounds": {"model.rounds": 3},
    # the best pair of changes
    "silu on the signals, 3 rounds": {"model.message_activation": "silu", "model.rounds": 3},
}
STUDY = Study(
    sweep=cases("change", CHANGES) * seeds(3),
    config="ngc_small",
    common={
        "model.match": "dense_small:0.32",
        "train.steps": 500,
        "stability.every": 0,
        "rate": 1e-2,
    },
    baseline={"change": "as shipped"},
    legend={
        "change": "as shipped: `configs/ngc_small.py`; groups hear themselves: complete wiring, so "
        "that a group also sends messages to itself; no ports: no messages between groups"
    },
)
