"""Stability as an instrument: exponents, contraction, drive, departure, bounds. The public names,
and nothing else.

The kernels take any `step(x, u) -> x`; the functions with a `model` take this project's. See
docs/stability.md.
"""

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

__all__ = [
    "attention_weights_by_stage",
    "bootstrap_interval",
    "boundedness",
    "contraction",
    "departure",
    "depth_exponents",
    "drive_ratio",
    "entropy_rate",
    "gain_bound",
    "kaplan_yorke_dimension",
    "leading_exponent",
    "local_exponents",
    "lyapunov_spectrum",
    "round_exponents",
    "round_states",
    "rounds_step",
    "silenced",
    "token_contraction",
    "token_exponents",
    "traffic",
]
