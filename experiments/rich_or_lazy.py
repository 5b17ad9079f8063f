"""Do weights of low rank at start make for richer learning?

NGC and dense loops whose weights start with rank 4, 16 or as drawn (`model.init_rank`), the
question that arXiv 2310.08513 asks of recurrent networks: held-out loss, effective ranks at start
and at the end, how far parameters and weights moved, and how far the tangent kernel turned. It does
not say which of the two models is better.

    python -m experiments.run rich_or_lazy
"""

import pathlib
import statistics
from typing import Any

import jax

from experiments.learning import effective_ranks, generated, logit_kernel, movements
from experiments.study import Study
from experiments.sweeps import cases, seeds
from experiments.tangent_kernel import alignment, movement
from ngc_jax.data.batches import held_out_batches
from ngc_jax.nn.decoder import Decoder
from ngc_jax.training.load import load
from ngc_jax.training.step import init_state

STEPS = 400
WINDOWS = 32  # of held-out text, for the kernel
kernel = jax.jit(logit_kernel, static_argnums=0)


def mean_rank(model: Decoder, params: Any) -> float:
    """The mean of effective ranks over all weight matrices."""
    return statistics.mean(
        rank for stage in effective_ranks(model, params).values() for rank in stage.values()
    )


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """What learning did to one run's model."""
    trained = load(workdir)
    config, model, after = trained.config, trained.decoder, trained.state.params
    before = jax.jit(lambda: init_state(model, config.train, config.seed).params)()
    windows = trained.data().validation
    batch, _ = next(held_out_batches(windows, batch_size=WINDOWS, limit=WINDOWS))
    return {
        "effective rank at start": mean_rank(model, before),
        "at the end": mean_rank(model, after),
        "parameters moved": movements(model, before, after)[
            "matrix" if config.model.rule == "dense" else "state"
        ],
        "weights moved": float(movement(generated(model, before), generated(model, after))),
        "kernel turned": float(
            1 - alignment(kernel(model, before, batch), kernel(model, after, batch))
        ),
    }


FIELDS = {
    "train.steps": STEPS,
    "train.warmup_steps": STEPS // 10,
    "eval.every": STEPS,
    "checkpoint.every_steps": STEPS,
    "stability.every": 0,
}
RANKS = {"rank 4": {"model.init_rank": 4}, "rank 16": {"model.init_rank": 16}, "as drawn": {}}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"rate": 1e-2},
    "dense": {"model.rule": "dense", "rate": 5e-3},
}  # as configs/ngc_small.py, dense_small.py
STUDY = Study(
    sweep=cases("model", MODELS) * cases("at start", RANKS) * seeds(3),
    config="ngc_tiny",
    common=FIELDS,
    measure=measure,
    baseline={"at start": "as drawn"},
)
