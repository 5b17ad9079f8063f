"""Stability as an instrument: exponents, contraction, drive, departure, bounds. The public names, and nothing else.

The kernels take any `step(x, u) -> x`; the functions with a `model` take this project's. See docs/stability.md.
"""

from ngc_jax.core.bound import contraction_bound, gain_bound
from ngc_jax.core.lyapunov import (
    bootstrap_interval,
    entropy_rate,
    kaplan_yorke_dimension,
    leading_exponent,
    local_exponents,
    lyapunov_spectrum,
)
from ngc_jax.core.stability import (
    Transport,
    boundedness,
    contraction,
    departure,
    drive_ratio,
    token_contraction,
    transport,
)
from ngc_jax.stability.systems import (
    attention_shares,
    depth_exponents,
    round_exponents,
    round_states,
    rounds_step,
    silenced,
    token_exponents,
    traffic,
)

__all__ = [
    "Transport",
    "attention_shares",
    "bootstrap_interval",
    "boundedness",
    "contraction",
    "contraction_bound",
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
    "transport",
]
