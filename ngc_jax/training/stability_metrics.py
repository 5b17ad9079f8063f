"""A model's stability while it trains: what is measured of it, and what the loss asks of it.

For: a row of the log, as `config.stability` chooses, `PROBES` takes more; and terms of the loss.
Not for: spectra of a finished model (`analysis/`), or warnings (`monitors.py`).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngc_jax.analysis import probes
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics.measures import Round, contraction, departure, summarise, token_contraction
from ngc_jax.nn.decoder import Decoder

Array = jax.Array
Measures = dict[str, Array]
Penalty = Callable[[Any, Batch, Array], Array]


class Seen(NamedTuple):
    """What a probe looks at: a model on a batch, and its last stream, computed once for all."""

    model: Decoder
    params: Any
    batch: Batch
    config: Any  # config.stability
    stream: Array  # [B, T, D] after the last stage
    records: Round | None  # of the rounds, where there is a loop


def tokens(seen: Seen) -> Measures:
    """contraction_per_token, the slope over the last stream; absent for fewer than 3 tokens."""
    if seen.stream.shape[1] < 3:
        return {}
    return {"contraction_per_token": jnp.mean(token_contraction(seen.stream))}


def departures(seen: Seen) -> Measures:
    """How far messages, and the drive, move the last stream."""
    found = {}
    for what in probes.parts_to_silence(seen.model.shape):
        params = probes.silenced(seen.model, seen.params, what)
        without, _ = _last_stream(seen.model, params, seen.batch)
        found[f"departure_{what}"] = jnp.mean(departure(seen.stream, without))
    return found


def exponents(seen: Seen) -> Measures:
    """The leading exponent per stage, and per round, followed for `config.rounds` rounds."""
    where = (seen.model, seen.params, seen.batch)
    found = {"exponent_per_stage": jnp.mean(probes.depth_exponents(*where))}
    if seen.model.shape.core:
        leading = probes.round_exponents(*where, rounds=seen.config.rounds)
        found["exponent_per_round"] = jnp.mean(leading)
    return found


# What `config.stability.measures` may name. A probe of your own: PROBES["mine"] = function.
PROBES: dict[str, Callable[[Seen], Measures]] = {
    "rounds": lambda seen: summarise(seen.records) if seen.records else {},  # of the loop
    "tokens": tokens,
    "departure": departures,
    "exponents": exponents,
}


def make_watch(model: Decoder, config: Any) -> Callable[[Any, Batch], Measures]:
    """The probes of `config.measures`: (params, batch) -> {"stability/...": mean of sequences}."""

    def watch(params: Any, batch: Batch) -> Measures:
        seen = Seen(model, params, batch, config, *_last_stream(model, params, batch))
        found = [PROBES[name](seen).items() for name in config.measures.split(",")]
        return {f"stability/{name}": value for name, value in itertools.chain(*found)}

    return watch


def _last_stream(model: Decoder, params: Any, batch: Batch) -> tuple[Array, Round | None]:
    x = model.embed(params, batch)
    stream, _, records = model.stream(params, x, batch.segments, record=model.shape.core > 0)
    return stream, records


def jacobian_penalty(step: Callable[[Array], Array], x: Array, key: Array) -> Array:
    """|v^T J|^2 / n for a random v: unbiased for |J|_F^2 / n, J at x [n] (arXiv 2106.14342, 4)."""
    v = jax.random.normal(key, x.shape, x.dtype)
    (pulled,) = jax.vjp(step, x)[1](v)
    return jnp.mean(jnp.square(pulled))


def make_penalty(model: Decoder, config: Any) -> Penalty | None:
    """(params, batch, key) -> nats per token to add to the loss; None: nothing is asked.

    The band holds a natural logarithm per round, of the contraction or the leading exponent.
    """
    if config.regulariser == "none" and not config.jacobian:
        return None
    rounds = model.shape.rounds

    def penalty(params: Any, batch: Batch, key: Array) -> Array:
        total = jnp.zeros(())
        if config.regulariser == "contraction":
            factors = contraction(probes.round_states(model, params, batch, rounds))
            held = jnp.mean(jnp.log(factors + 1e-6))
        if config.regulariser == "exponent":
            held = jnp.mean(probes.round_exponents(model, params, batch, rounds=rounds))
        if config.regulariser != "none":
            outside = jnp.maximum(held - config.high, 0) + jnp.maximum(config.low - held, 0)
            total += config.weight * jnp.square(outside)
        if config.jacobian:
            step, _ = probes.rounds_step(model, params, batch)
            settled = probes.round_states(model, params, batch, rounds)[-1]
            total += config.jacobian * jacobian_penalty(lambda x: step(x, None), settled, key)
        return total

    return penalty
