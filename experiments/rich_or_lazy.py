"""Do initial weights of low rank make learning richer?

NGC and dense loops whose initial weights have rank 4, 16 or full rank (`model.init_rank`), the
question that arXiv 2310.08513 asks for recurrent networks. Measures: held-out loss, effective rank
before and after training, how far parameters and weights moved, how far the tangent kernel rotated.
The study does not compare NGC with dense.

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
WINDOWS = 32  # windows of held-out text for the kernel
kernel = jax.jit(logit_kernel, static_argnums=0)


def mean_rank(model: Decoder, params: Any) -> float:
    """The mean effective rank of all weight matrices."""
    return statistics.mean(
        rank for stage in effective_ranks(model, params).values() for rank in stage.values()
    )


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The changes of one run's model by training."""
    trained = load(workdir, trust=True)  # `run` has just trained it as the study says
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
    legend={
        "at start": "rank of the initial weights; as drawn: full rank",
        "effective rank at start": "mean over weight matrices",
        "at the end": "effective rank after training, mean over weight matrices",
        "parameters moved": "length of the change, relative to the initial length",
        "weights moved": "the same for the weights that the parameters generate",
        "kernel turned": "1 - alignment of the tangent kernels before and after training",
    },
)
