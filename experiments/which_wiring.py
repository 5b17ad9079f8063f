"""Which groups should receive from which?

Complete wiring is compared with sparser ones, fixed and dynamic, with four of eight channels per
group at the end. They have fewer parameters and FLOPs, which are not used elsewhere.

    python -m experiments.run which_wiring
"""

from experiments.setting import COMMON, LARGER, STEPS
from experiments.study import Study
from experiments.sweeps import cases, seeds
from ngc_jax.core.wiring import DYNAMIC, WIRINGS

SPARSE = {
    name: {"model.wiring": name, "model.channels": 3 if name == "block" else 4} for name in WIRINGS
}
CHANGING = {"model.channels": 7, "rewire.channels": 4, "rewire.every": STEPS // 20}
MOVING = {name: {"model.wiring": name, **CHANGING} for name in DYNAMIC}
STUDY = Study(
    sweep=cases("wiring", {"complete": {}, **SPARSE, **MOVING}) * seeds(3),
    common={**COMMON, "rate": 1e-2},
    larger=LARGER,
    baseline={"wiring": "complete"},
)
