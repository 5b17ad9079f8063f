"""Loss curves as a picture: `python -m ngc_jax.plot --out=curve.png DIR [DIR ...]`.

For: drawing metrics.jsonl of runs. Not for: reports of studies (`experiments/`).
"""

import argparse
import os
import pathlib

from ngc_jax.commands.arguments import command
from ngc_jax.report.figures import look, matplotlib
from ngc_jax.runtime.errors import UserError, plain
from ngc_jax.runtime.files import expand
from ngc_jax.runtime.output import doing


def draw(workdirs: list[pathlib.Path], out: pathlib.Path) -> None:
    """Draws train loss (thin) and held-out loss (points) over updates, one look for each run.

    Raises UserError where nothing can be read or written, and without matplotlib.
    """
    from ngc_jax.runtime.metrics import read_rows

    figure = matplotlib().figure.Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axes, low, high = figure.add_subplot(), [], []
    for place, workdir in enumerate(workdirs):
        rows, style = read_rows(workdir), look(place)
        train, held_out = (
            [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            for name in ("train/loss", "eval/loss")
        )
        if not train:
            raise UserError(f"{workdir} has no rows in metrics.jsonl: give a run's work directory")
        axes.plot(*zip(*train, strict=True), color=style["color"], linewidth=0.7, alpha=0.45)
        if held_out:
            # No "$", which begins mathematics, nor "_" at the start, which hides a label.
            name = os.fsencode(workdir.absolute().name).decode(errors="backslashreplace")
            name = plain(name).replace("$", r"\$")
            label = f"held out {held_out[-1][1]:.3f}: {name}"
            axes.plot(*zip(*held_out, strict=True), markersize=4, label=label, **style)
        losses = sorted(loss for _, loss in train)
        low.append(losses[0])
        high.append(losses[int(0.95 * (len(losses) - 1))])
    axes.set_ylim(0.95 * min(low), 1.05 * max(high))
    axes.set(xlabel="updates", ylabel="loss (nats per token)")
    axes.set_title("points: held-out text; thin: each logged training batch", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={out} cannot be written: {error}") from error


def main() -> None:
    """Draws the runs of a command line."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    where = "PNG, SVG or PDF; default: curve.png"
    arguments.add_argument("--out", type=expand, default=pathlib.Path("curve.png"), help=where)
    arguments.add_argument("workdirs", nargs="+", type=expand, help="of runs, one curve each")
    args = arguments.parse_args()
    with doing("drawing"):
        draw(args.workdirs, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    command(main, goes_on=True)
