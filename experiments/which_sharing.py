"""Which synapses can share their sending states?

The loop has four stages, so that sharing over depth has stages to share. Saved parameters are not
used elsewhere.

    python -m experiments.run which_sharing
"""

from experiments.setting import COMMON, LARGER
from experiments.study import Study
from experiments.sweeps import cases, seeds

SHARINGS = (
    "none",
    "qkv",
    "gate_up",
    "qkv,gate_up",
    "depth2",
    "depth2,readers",
    "qkv,gate_up,depth2",
)
STUDY = Study(
    sweep=cases("sharing", {name: {"model.sharing": name} for name in SHARINGS}) * seeds(3),
    common={
        **COMMON,
        "model.prelude": 0,
        "model.core": 4,
        "model.coda": 0,
        "model.rounds": 1,
        "rate": 1e-2,
    },
    larger=LARGER,
    baseline={"sharing": "none"},
)
