"""Probes and bounds of a model (docs/stability.md); kernels, for any step, are in `dynamics`."""
# ruff: noqa: F401 (the public names, and nothing else)

from ngc_jax.analysis.bounds import gain_bound
from ngc_jax.analysis.probes import (
    attention_weights_by_stage,
    depth_exponents,
    round_exponents,
    round_states,
    rounds_step,
    silenced,
    token_exponents,
    traffic,
)
