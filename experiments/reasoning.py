"""Does iteration solve p-hop induction, where a feed-forward model of the same size does not?

Training has one to four hops, the test up to 32. NGC and the dense loop run one round for each hop
of a problem (as in `configs/ngc_hops.py`). A dense stack has five stages, BDH five layers. All
models have at most 50,000 parameters. The same number of shorter runs searches each learning rate.
A problem is solved if all its letters are right.

    python -m experiments.run reasoning
"""

import pathlib
from typing import Any

from experiments.setting import LARGER_TASK, SMALL_DENSE, learning
from experiments.study import Study
from experiments.sweeps import cases, seeds
from ngc_jax.data.tasks import TASKS
from ngc_jax.training.evaluation import examine
from ngc_jax.training.load import load

HOPS = (1, 4, 5, 8, 16, 32)
EXAMPLES = 200  # problems of each number of hops
STEPS = 3000
COMMON: dict[str, Any] = {
    **learning(STEPS),
    "data.task": "hops",
    "data.low": 1,
    "data.high": 4,
    "data.context": 52,
    "model.attend": 32,
    "model.qk_gain": 3.0,
    "model.width": 64,
    "model.hidden": 128,
    "rate": (5e-3, 1e-2, 2e-2),
}
LOOP: dict[str, Any] = {
    "model.keep": 0.05,
    "model.drive": False,
    "model.route": "start",
    "model.state_activation": "tanh",
    "iteration.rounds": "marked",
    "iteration.mark": TASKS["hops"].symbols.index(">"),
    "iteration.high": 4,
    "iteration.noise": 0.5,
}
STACK: dict[str, Any] = {"model.prelude": 5, "model.core": 0, "model.width": 24, "model.hidden": 76}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": LOOP,
    "dense looped": {**SMALL_DENSE, **LOOP},
    "dense": {**SMALL_DENSE, **STACK},
    "BDH": {"model.kind": "bdh", "model.rounds": 5, "model.width": 32, "model.hidden": 480},
}


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The fraction of problems solved, by the number of hops."""
    trained = load(workdir)
    return {
        f"exact, {n} hops": examine(trained.model, trained.params, trained.config, n, EXAMPLES)[
            "exact"
        ]
        for n in HOPS
    }


STUDY = Study(
    sweep=cases("model", MODELS) * seeds(3),
    common=COMMON,
    larger=LARGER_TASK,
    measure=measure,
    outcome=f"exact, {HOPS[-1]} hops",
    tuning=1 / 6,
    baseline={"model": "dense"},
    legend={"exact, 32 hops": "fraction of problems of 32 hops solved; other hops likewise"},
)
