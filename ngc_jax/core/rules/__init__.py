"""Rules, from states to weights: the public names, and nothing else."""

from ngc_jax.core.rules.base import Rule, SignalRule, States
from ngc_jax.core.rules.table import (
    GATES,
    RULES,
    activation_gain,
    emit,
    named,
    signal_rule,
    transmit,
    weights,
)

__all__ = [
    "GATES",
    "RULES",
    "Rule",
    "SignalRule",
    "States",
    "activation_gain",
    "emit",
    "named",
    "signal_rule",
    "transmit",
    "weights",
]
