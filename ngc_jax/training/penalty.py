"""Terms of the loss that ask for stability; all are off by default.

For: a band on the contraction or the leading exponent of the loop, and the Jacobian penalty of deep
equilibrium models. Not for: measuring (`stability_metrics.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.analysis.probes import round_exponents, round_states, rounds_step
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics.measures import contraction
from ngc_jax.nn.decoder import Decoder

Array = jax.Array
Penalty = Callable[[Any, Batch, Array], Array]


def band(value: Array, low: float, high: float) -> Array:
    """0 inside [low, high], else the square of how far outside."""
    return jnp.square(jnp.maximum(value - high, 0) + jnp.maximum(low - value, 0))


def jacobian_penalty(step: Callable[[Array], Array], x: Array, key: Array) -> Array:
    """|v^T J|^2 / n for one random v: unbiased for |J|_F^2 / n, J the Jacobian at x of n numbers.

    Hutchinson's estimate as in deep equilibrium models (Bai et al. 2021, arXiv 2106.14342, 4).
    """
    v = jax.random.normal(key, x.shape, x.dtype)
    (pulled,) = jax.vjp(step, x)[1](v)
    return jnp.mean(jnp.square(pulled))


def make_penalty(model: Decoder, config: Any) -> Penalty | None:
    """(params, batch, key) -> scalar to add to the loss in nats per token; None: nothing is asked.

    config is `config.stability`. The band holds a natural logarithm per round, of the contraction
    (mean over rounds and tokens) or the leading exponent (mean over sequences), over
    `model.rounds` rounds, whatever number an update draws (`rounds.py`).
    """
    if config.regulariser == "none" and not config.jacobian:
        return None
    rounds = model.shape.rounds

    def penalty(params: Any, batch: Batch, key: Array) -> Array:
        total = jnp.zeros(())
        if config.regulariser == "contraction":
            factors = contraction(round_states(model, params, batch, rounds))
            held = jnp.mean(jnp.log(factors + 1e-6))
        if config.regulariser == "exponent":
            held = jnp.mean(round_exponents(model, params, batch, rounds=rounds))
        if config.regulariser != "none":
            total += config.weight * band(held, config.low, config.high)
        if config.jacobian:
            step, _ = rounds_step(model, params, batch)
            settled = round_states(model, params, batch, rounds)[-1]
            total += config.jacobian * jacobian_penalty(lambda x: step(x, None), settled, key)
        return total

    return penalty
