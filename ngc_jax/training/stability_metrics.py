"""What is measured of a model's stability while it trains, on a little held-out data.

For: the numbers of one row of the log, as `config.stability` chooses; `PROBES` takes more. Not for:
spectra of a finished model (`analysis/`), the loss (`penalty.py`), or warnings (`monitors.py`).
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngc_jax.analysis.probes import depth_exponents, parts_to_silence, round_exponents, silenced
from ngc_jax.data.batches import Batch
from ngc_jax.dynamics.measures import Round, departure, summarise, token_contraction
from ngc_jax.nn.decoder import Decoder

Array = jax.Array
Measures = dict[str, Array]


class Seen(NamedTuple):
    """What a probe looks at: a model on a batch, and its last stream, computed once for all."""

    model: Decoder
    params: Any
    batch: Batch
    config: Any  # config.stability
    stream: Array  # [B, T, D] after the last stage
    records: Round | None  # of the rounds, where there is a loop


def rounds(seen: Seen) -> Measures:
    """Contraction, drive ratio and boundedness of the loop."""
    return {} if seen.records is None else summarise(seen.records)


def tokens(seen: Seen) -> Measures:
    """contraction_per_token, the slope over the last stream; absent for fewer than 3 tokens."""
    if seen.stream.shape[1] < 3:
        return {}
    return {"contraction_per_token": jnp.mean(token_contraction(seen.stream))}


def departures(seen: Seen) -> Measures:
    """How far messages, and the drive, move the last stream."""
    found = {}
    for what in parts_to_silence(seen.model.shape):
        params = silenced(seen.model, seen.params, what)
        without, _ = _last_stream(seen.model, params, seen.batch)
        found[f"departure_{what}"] = jnp.mean(departure(seen.stream, without))
    return found


def exponents(seen: Seen) -> Measures:
    """The leading exponent per stage, and per round, followed for `config.rounds` rounds."""
    where = (seen.model, seen.params, seen.batch)
    found = {"exponent_per_stage": jnp.mean(depth_exponents(*where))}
    if seen.model.shape.core:
        found["exponent_per_round"] = jnp.mean(round_exponents(*where, rounds=seen.config.rounds))
    return found


# What `config.stability.measures` may name. A probe of your own: PROBES["mine"] = function.
PROBES: dict[str, Callable[[Seen], Measures]] = {"rounds": rounds, "tokens": tokens}
PROBES |= {"departure": departures, "exponents": exponents}


def make_watch(model: Decoder, config: Any) -> Callable[[Any, Batch], Measures]:
    """The probes of `config.measures`: (params, batch) -> {"stability/...": scalar}, in float32.

    Each is a mean over sequences; what a model does not have (a loop, messages) is left out.
    """

    def watch(params: Any, batch: Batch) -> Measures:
        seen = Seen(model, params, batch, config, *_last_stream(model, params, batch))
        found = [PROBES[name](seen).items() for name in config.measures.split(",")]
        return {f"stability/{name}": value for name, value in itertools.chain(*found)}

    return watch


def _last_stream(model: Decoder, params: Any, batch: Batch) -> tuple[Array, Round | None]:
    x = model.embed(params, batch)
    stream, _, records = model.stream(params, x, batch.segments, record=model.shape.core > 0)
    return stream, records
