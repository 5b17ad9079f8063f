"""Stability as an instrument: exponents, contraction, drive, departure, bounds (docs/stability.md).

The kernels take any `step(x, u) -> x`; the functions with a `model` take this project's.
"""
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
from ngc_jax.dynamics.lyapunov import (
    bootstrap_interval,
    entropy_rate,
    kaplan_yorke_dimension,
    leading_exponent,
    local_exponents,
    lyapunov_spectrum,
)
from ngc_jax.dynamics.measures import (
    boundedness,
    contraction,
    departure,
    drive_ratio,
    token_contraction,
)
