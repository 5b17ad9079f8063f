"""What is measured of a model's stability while it trains, on a little held-out text, as
`config.stability` chooses.

For: the numbers of one row of the log. Not for: pages and spectra of a finished model (`page.py`),
what is added to the loss (`regulariser.py`), or warnings (`monitor.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.analysis.probes import depth_exponents, round_exponents, silenced
from ngc_jax.dynamics.measures import departure, summarise, token_contraction
from ngc_jax.nn.decoder import Decoder

Array = jax.Array
MEASURES = ("rounds", "tokens", "departure", "exponents")


def make_watch(model: Decoder, config: Any) -> Callable[[Any, Array], dict[str, Array]]:
    """The measures of `config.measures`: (params, tokens [B, T]) -> {"stability/...": scalar}, in
    float32.

    "rounds": contraction, drive ratio and boundedness of the loop. "tokens": contraction_per_token,
    the slope over the last stream. "departure": how far messages, and the drive, move the last
    stream. "exponents": the leading one per stage, and per round, followed for `config.rounds`
    rounds. Each is a mean over sequences; what a model does not have (a loop, messages) is left
    out.
    """
    s, measures = model.shape, config.measures.split(",")

    def last_stream(params: Any, tokens: Array) -> Any:
        return model.stream(
            params, params["embed"][tokens], jnp.arange(tokens.shape[1]), record=s.core > 0
        )

    def watch(params: Any, tokens: Array) -> dict[str, Array]:
        found: dict[str, Array] = {}
        x, _, records = last_stream(params, tokens)
        if "rounds" in measures and records is not None:
            found |= summarise(records)
        if "tokens" in measures and tokens.shape[1] >= 3:
            found["contraction_per_token"] = jnp.mean(token_contraction(x))
        if "departure" in measures:
            kinds = ["messages"] * s.has_messages + ["drive"] * s.has_drive
            for what in kinds:
                without = last_stream(silenced(params, what), tokens)[0]
                found[f"departure_{what}"] = jnp.mean(departure(x, without))
        if "exponents" in measures:
            found["exponent_per_stage"] = jnp.mean(depth_exponents(model, params, tokens))
            if s.core:
                found["exponent_per_round"] = jnp.mean(
                    round_exponents(model, params, tokens, rounds=config.rounds)
                )
        return {f"stability/{name}": value for name, value in found.items()}

    return watch
