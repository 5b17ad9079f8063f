"""How much is a round worth?

Held-out loss over width and number of rounds, and the recurrence exponent phi of arXiv 2604.21106
fitted to it: L = E + A (N_once + r^phi N_rec)^-alpha, where N_rec parameters in matrices are run r
times and N_once once. phi = 1: a round is worth as much as a stage of its own; 0: nothing. Plain
loops elsewhere: 0.46. Interval by bootstrap over the runs.

    python -m experiments.run worth_of_a_round
"""

import numpy as np
import scipy.optimize

from experiments.blocks import Block, Heading, Words
from experiments.setting import COMMON, LONGER
from experiments.study import LOSS, Results, Study
from experiments.sweeps import cases, seeds, vary
from ngc_jax import count

DRAWS = 500  # of the bootstrap
GUESSES = ((0.8, 5.0, 0.2, 0.5), (0.3, 5.0, 0.1, 0.2), (1.0, 20.0, 0.4, 0.8))  # E, A, alpha, phi
BOUNDS = ((0.0, 0.0, 0.01, -1.0), (2.0, 1e4, 2.0, 2.0))


def law(of: np.ndarray, floor: float, scale: float, alpha: float, phi: float) -> np.ndarray:
    """L for rows N_once, N_rec, r of `of`."""
    once, recurrent, rounds = of
    return floor + scale * (once + rounds**phi * recurrent) ** -alpha


def fit(of: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """E, A, alpha, phi of the least squares, from the best of several beginnings."""
    found = [
        scipy.optimize.least_squares(
            lambda x: law(of, *x) - losses, guess, bounds=BOUNDS, x_scale=guess
        )
        for guess in GUESSES
    ]
    return min(found, key=lambda one: one.cost).x


def answer(results: Results) -> list[Block]:
    """The fit, phi's interval, and how far off the fit is."""
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
    said = (
        f"phi = {best[3]:.2f}, 95% interval {low:.2f} to {high:.2f} ({DRAWS} bootstrap draws of {len(rows)} runs); "
        f"E = {best[0]:.2f}, A = {best[1]:.3g}, alpha = {best[2]:.2f}; root mean square distance {off:.4f} nats."
    )
    return [Heading("The recurrence exponent"), Words(said)]


WIDTHS = {
    f"width {width}": {"model.width": width, "model.hidden": 3 * width} for width in (32, 48, 64)
}
STUDY = Study(
    sweep=cases("width", WIDTHS) * vary("model.rounds", (1, 2, 4, 8)) * seeds(2),
    common={**COMMON, "model.core": 2, "rate": 1e-2},
    larger=LONGER,
    answer=answer,
)
