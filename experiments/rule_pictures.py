"""The weights that each rule makes: one picture for each rule, by one command:

    python -m experiments.rule_pictures --out=docs/rules

For: docs/method.md. A picture has a generated weight matrix before training, with lines between
groups, and its singular values beside those of a Gaussian matrix of the same size and variance. Not
for: trained models (`python -m ngc_jax.stability`).
"""

import argparse
import pathlib

import jax
import numpy as np

from ngc_jax import RULES, weights
from ngc_jax.commands.arguments import command
from ngc_jax.report.figures import BLUE, RED, matplotlib
from ngc_jax.runtime.files import expand

# DIM: as p_inter in configs; a block has one number for each member of its group instead
GROUPS, NEURONS, DIM = 8, 64, 3
LEAST = 1e-6  # relative to the largest: smaller singular values are 0 up to rounding in float32


def draw(rule: str, out: pathlib.Path) -> None:
    """Write a PNG of W of `rule`, NEURONS by NEURONS in GROUPS groups, and its singular values."""
    w = np.asarray(
        weights(rule, *RULES[rule].init(jax.random.key(0), GROUPS, NEURONS, NEURONS, DIM)),
        np.float64,
    )
    values = np.linalg.svd(w, compute_uv=False)
    gaussian = np.random.default_rng(0).normal(size=w.shape) * NEURONS**-0.5
    # (sum of squares)^2 / sum of fourth powers: the number of equal singular values with the same
    # spread of variance
    spread = np.sum(values**2) ** 2 / np.sum(values**4)
    rank = int(np.sum(values > LEAST * values[0]))

    figure = matplotlib().figure.Figure(
        figsize=(6.8, 3.1), dpi=90, layout="constrained", facecolor="white"
    )
    left, right = figure.subplots(1, 2)
    limit = np.quantile(np.abs(w[w != 0]), 0.98)
    image = left.imshow(w, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    for edge in range(NEURONS // GROUPS, NEURONS, NEURONS // GROUPS):
        left.axhline(edge - 0.5, color="0.3", linewidth=0.5)
        left.axvline(edge - 0.5, color="0.3", linewidth=0.5)
    left.set(
        xticks=[],
        yticks=[],
        xlabel="sending neuron, by groups",
        ylabel="receiving neuron, by groups",
    )
    figure.colorbar(image, ax=left, fraction=0.046, pad=0.03, label="weight")
    at = np.arange(1, NEURONS + 1)
    right.semilogy(
        at,
        np.linalg.svd(gaussian, compute_uv=False),
        color="0.5",
        linestyle="--",
        label="Gaussian matrix",
    )
    right.semilogy(at[:rank], values[:rank], "o", color=BLUE, markersize=3, label=rule)
    if rank < NEURONS:
        right.axvline(
            rank + 0.5, color=RED, linewidth=1, linestyle=":", label="beyond: 0 up to rounding"
        )
    right.set(ylim=(1e-3, 60), xlim=(0, NEURONS + 1))
    right.set(xlabel="index of the singular value", ylabel="singular value")
    right.set_title(f"rank {rank}, spread {spread:.1f} of {NEURONS}", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--out", type=expand, default=pathlib.Path("docs/rules"), help="a folder for the PNGs"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for rule in RULES:
        draw(rule, args.out / f"{rule}.png")
        print(f"wrote {args.out / rule}.png")


if __name__ == "__main__":
    command(main, goes_on=True)
