"""Are wrong answers less converged than right ones?

Looped models learn sums of digits modulo five, "3204=4", of one to five terms. The test has
held-out sums of three to eight terms. At the "=" it measures how far the last round still moves the
state, for right and for wrong answers. "AUROC" is the probability that a wrong answer has a larger
value than a right answer with the same number of terms; 0.5 means no difference.

    python -m experiments.run settled
"""

import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stats import auroc
from experiments.study import Study
from experiments.sums import keep, sums
from experiments.sweeps import cases, seeds
from ngc_jax.analysis import round_states
from ngc_jax.data.batches import Batch
from ngc_jax.data.tokenizer import Bytes
from ngc_jax.dynamics.measures import contraction, norm
from ngc_jax.training.load import load

STEPS, ROUNDS = 1000, 4
TRAINED, ASKED = (1, 2, 3, 4, 5), (3, 4, 5, 6, 7, 8)  # terms of a sum in training, in the test
CONTEXT = 64
COMMON = {
    "data.path": "{DIR}/sums.txt",
    "data.context": CONTEXT,
    "model.width": 64,
    "model.hidden": 192,
    "model.rounds": ROUNDS,
    "train.steps": STEPS,
    "train.batch_size": 32,
    "eval.every": STEPS,
    "checkpoint.every_steps": STEPS,
}
MODELS: dict[str, dict[str, Any]] = {
    "NGC": {"rate": 5e-3},
    "dense looped": {"model.rule": "dense", "rate": 2e-3},
}
MEASURES = ("last step", "last contraction", "entropy of the answer")


def answers(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """For each held-out sum: its terms, whether the answer is right, and the MEASURES of the state
    at its "=".
    """
    trained = load(workdir)
    model, params = trained.decoder, trained.params
    text = ("\n".join(sums(6000, ASKED, seed=1, held_out=True)) + "\n").encode()
    tokens = np.asarray(Bytes().encode(text), np.int32)
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)

    @jax.jit
    def measure(params: Any, inputs: jax.Array) -> dict[str, jax.Array]:
        logits, _ = model.apply(params, Batch(inputs))
        states = round_states(model, params, Batch(inputs), ROUNDS)
        p = jax.nn.softmax(logits)
        return {
            "prediction": jnp.argmax(logits, axis=-1),
            "last step": norm(states[-1] - states[-2]) / norm(states[-1]),
            "last contraction": contraction(states)[-1],
            "entropy of the answer": -jnp.sum(p * jnp.log(p + 1e-9), axis=-1),
        }

    parts = [
        jax.device_get(measure(params, part[:, :-1]))
        for part in np.array_split(windows, len(windows) // 64)
    ]
    seen = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found: dict[str, list[float]] = {name: [] for name in ("terms", "right", *MEASURES)}
    equals, line = ord("="), ord("\n")
    for row, window in enumerate(windows):
        begins = np.flatnonzero(window == line)
        for at in np.flatnonzero(window[:-1] == equals):
            before = begins[begins < at]
            if not len(before):
                continue  # the window begins inside this sum
            found["terms"].append(at - before[-1] - 1)
            found["right"].append(seen["prediction"][row, at] == window[at + 1])
            for name in MEASURES:
                found[name].append(seen[name][row, at])
    return {name: np.array(values) for name, values in found.items()}


def within_difficulty(found: dict[str, np.ndarray], name: str) -> float:
    """AUROC among sums with the same number of terms: mean weighted by the number of wrong
    answers.
    """
    total, weight = 0.0, 0
    for terms in ASKED:
        of = found["terms"] == terms
        right = found["right"].astype(bool)
        wrong_values, right_values = found[name][of & ~right], found[name][of & right]
        if len(wrong_values) >= 5 and len(right_values) >= 5:
            total += auroc(wrong_values, right_values) * len(wrong_values)
            weight += len(wrong_values)
    return total / weight if weight else math.nan


def measure(workdir: pathlib.Path) -> dict[str, float]:
    """The fraction of right answers by terms, and the AUROC of each of MEASURES."""
    found = answers(workdir)
    right = {
        f"right, {terms} terms": float(np.mean(found["right"][found["terms"] == terms]))
        for terms in ASKED
    }
    return right | {f"AUROC of the {name}": within_difficulty(found, name) for name in MEASURES}


STUDY = Study(
    sweep=cases("model", MODELS) * seeds(3),
    common=COMMON,
    prepare=partial(keep, terms=TRAINED),
    measure=measure,
    legend={
        "right, 3 terms": "fraction of right answers for sums of 3 terms; other terms likewise",
        "AUROC of the last step": "of the length of the last round's step, relative to the state",
        "AUROC of the last contraction": "of the last step over the previous one",
        "AUROC of the entropy of the answer": "of the entropy of the predicted distribution",
    },
)
