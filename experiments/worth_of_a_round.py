"""How much is a round worth?

Held-out loss over width and number of rounds, and the recurrence exponent phi of arXiv 2604.21106,
which is fitted to it: L = E + A (N_once + r^phi N_rec)^-alpha. N_rec parameters in matrices run r
times, N_once run once. phi = 1: a round is worth as much as another stage with its own parameters;
phi = 0: a round is worth nothing. The source reports 0.46 for plain loops. The interval is a
bootstrap over runs.

    python -m experiments.run worth_of_a_round
"""

import numpy as np
import scipy  # scipy.optimize is imported where it is used

from experiments.setting import COMMON, LONGER
from experiments.study import LOSS, Results, Study
from experiments.sweeps import cases, seeds, vary
from ngc_jax import count
from ngc_jax.report.blocks import Block, heading, table

DRAWS = 500  # of the bootstrap
GUESSES = ((0.8, 5.0, 0.2, 0.5), (0.3, 5.0, 0.1, 0.2), (1.0, 20.0, 0.4, 0.8))  # E, A, alpha, phi
BOUNDS = ((0.0, 0.0, 0.01, -1.0), (2.0, 1e4, 2.0, 2.0))


def law(of: np.ndarray, floor: float, scale: float, alpha: float, phi: float) -> np.ndarray:
    """L for the rows N_once, N_rec, r of `of`."""
    once, recurrent, rounds = of
    return floor + scale * (once + rounds**phi * recurrent) ** -alpha


def fit(of: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """E, A, alpha, phi by least squares: the best of several initial guesses."""
    found = [
        scipy.optimize.least_squares(
            lambda x: law(of, *x) - losses, guess, bounds=BOUNDS, x_scale=guess
        )
        for guess in GUESSES
    ]
    return min(found, key=lambda one: one.cost).x


def answer(results: Results) -> list[Block]:
    """The fitted law, the interval of phi, and the error of the fit."""
    rows = []
    for group, cost in zip(results.groups, results.costs, strict=True):
        recurrent = count.parameters(cost.shapes["core"], cost.info["core"]).matrices
        once, rounds = cost.matrices - recurrent, cost.config.model.rounds
        rows += [(once, recurrent, rounds, loss) for loss in results.of(group, LOSS).values()]
    if len(rows) < 8:
        return []
    points = np.array(rows, float).T
    best = fit(points[:3], points[3])
    chance = np.random.default_rng(0)
    drawn = [points[:, chance.integers(len(rows), size=len(rows))] for _ in range(DRAWS)]
    phis = [fit(draw[:3], draw[3])[3] for draw in drawn]
    low, high = np.quantile(phis, (0.025, 0.975))
    off = float(np.sqrt(np.mean((law(points[:3], *best) - points[3]) ** 2)))
    values = [
        ["phi", f"{best[3]:.2f}, 95% interval {low:.2f} to {high:.2f}"],
        ["bootstrap", f"{DRAWS} draws of {len(rows)} runs"],
        ["E (nats per token)", f"{best[0]:.2f}"],
        ["A", f"{best[1]:.3g}"],
        ["alpha", f"{best[2]:.2f}"],
        ["error of the fit, root mean square (nats per token)", f"{off:.4f}"],
    ]
    return [heading("The recurrence exponent"), table(["quantity", "value"], values)]


WIDTHS = {
    f"width {width}": {"model.width": width, "model.hidden": 3 * width} for width in (32, 48, 64)
}
STUDY = Study(
    sweep=cases("width", WIDTHS) * vary("model.rounds", (1, 2, 4, 8)) * seeds(2),
    common={**COMMON, "model.core": 2, "rate": 1e-2},
    larger=LONGER,
    answer=answer,
)
