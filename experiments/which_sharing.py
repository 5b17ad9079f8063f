"""Which synapses may share what they send?

Two stages in the loop, so that sharing over depth has stages to share. What sharing saves is not
spent on anything.

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
