"""Which rule should make the weights between groups?

All rules at equal parameters, each with a dense block inside every group. The size of states or
ports is solved.

    python -m experiments.run which_rule
"""

from typing import Any

from experiments.setting import COMMON, LARGER_SHARE, SHARE
from experiments.study import Study
from experiments.sweeps import cases, seeds
from ngc_jax.core.rules import rules_between_groups

RATES = (2.5e-3, 5e-3, 1e-2)
BY_WIDTH: dict[str, Any] = {
    "model.match_by": "width",
    "model.groups": 4,
}  # for dense, and for blocks alone: they have no states of variable size
RULES: dict[str, dict[str, Any]] = {
    rule: {"model.rule": rule, "rate": RATES} for rule in rules_between_groups()
}
RULES |= {rule: {**RULES[rule], **BY_WIDTH} for rule in ("none", "dense")}
STUDY = Study(
    sweep=cases("rule", RULES) * seeds(3),
    common={**COMMON, "model.match": SHARE, "model.match_by": "p_inter"},
    larger=LARGER_SHARE,
    baseline={"rule": "addressed"},
)
