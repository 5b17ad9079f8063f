"""Two functions timed in turn, and an update as a function that can be timed.

For: ratios, since machines are shared and drift, and the two are called alternately. Not for: the
speed of one run (`launch.py` logs it), or studies (`experiments/overhead.py`).
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ngc_jax.config import make_model
from ngc_jax.data.batches import Batch, token_batch
from ngc_jax.data.tokens import most_tokens, segmented
from ngc_jax.nn.model import LanguageModel
from ngc_jax.training.rounds import make_iteration, mark_of
from ngc_jax.training.step import init_state, make_train_step


class Paired(NamedTuple):
    """Medians over pairs: time(other) / time(plain), and the seconds of one call of each."""

    ratio: float
    plain: float
    other: float


def paired(
    plain: Callable[..., Any], other: Callable[..., Any], *args: Any, pairs: int = 9, calls: int = 1
) -> Paired:
    """Times `calls` calls of each function on `args` alternately, `pairs` times, after one call to
    warm up.
    """

    def seconds(function: Callable[..., Any]) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(function(*args))
        return (time.perf_counter() - began) / calls

    for function in (plain, other):
        jax.block_until_ready(function(*args))
    times = [(seconds(plain), seconds(other)) for _ in range(pairs)]
    ratio = statistics.median(b / a for a, b in times)
    return Paired(ratio, *(statistics.median(each) for each in zip(*times, strict=True)))


def model_of(config: ConfigDict) -> LanguageModel:
    """The model of a config, for the largest vocabulary that its text can have."""
    return make_model(config, most_tokens(config.data))


def zeros_of(config: ConfigDict) -> Batch:
    """A batch of a config's shape, all zeros."""
    segments = segmented(config.data, mark_of(config))
    shapes = token_batch(config.train.batch_size, config.data.context, segments)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)


def update_of(config: ConfigDict) -> Callable[[Any], Any]:
    """A config's compiled update as a function of the batch alone: it keeps the state."""
    model = model_of(config)
    state = jax.jit(lambda: init_state(model, config.train, 0))()
    iteration = make_iteration(model, config)
    step = jax.jit(make_train_step(model, config.train, iteration=iteration), donate_argnums=0)
    compiled = step.lower(state, zeros_of(config)).compile()

    def update(batch: Any) -> Any:
        nonlocal state
        state, scalars = compiled(state, batch)
        return scalars

    return update
