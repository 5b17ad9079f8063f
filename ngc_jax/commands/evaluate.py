"""Held-out loss of a trained model: `python -m ngc_jax.evaluate --workdir=DIR`.

Of images also accuracy with its interval, by class too, calibration, and what is taken for what.

For: `--rounds=8`, or `--rounds=settled`: until a round moves no token's state by `--tolerance` of
its length, `--cap` at most. Not for: the evaluation itself (`training/evaluation.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ngc_jax.commands.arguments import PLACES, ROUNDS, command, opened, parser, read, rounds_of
from ngc_jax.commands.solve import interval
from ngc_jax.report.blocks import aligned
from ngc_jax.runtime.errors import plain
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.output import doing

if TYPE_CHECKING:
    from ngc_jax.training.classification import Predicted

WINDOWS = Field("windows", 0, "held-out windows, problems or images, 0: all", "[0, inf)")
SHOWN = 20  # classes whose confusion is shown as a matrix; of more, so many pairs


def of_images(names: Sequence[str], found: "Predicted") -> str:
    """Accuracy, calibration, a table by class, and what is taken for what."""
    import numpy as np

    from ngc_jax.training import classification

    table, names = classification.confusion(found), [*map(plain, names)]
    right, count = int(np.trace(table)), int(table.sum())
    low, high = interval(right / count, count)
    lines = [
        f"accuracy {right / count:.2%}, {low:.2%} to {high:.2%} (95%, Wilson), {right} of {count}",
        f"negative log-likelihood {classification.negative_log_likelihood(found):.4f} nats",
        f"expected calibration error {classification.calibration_error(found):.4f}",
    ]
    rows = [["class", "images", "right", "95% interval", "of those said to be it"]]
    for name, own, said, hit in zip(names, table.sum(1), table.sum(0), np.diag(table), strict=True):
        low, high = interval(hit / own, own) if own else (0.0, 1.0)
        shown = [f"{hit / own:.2%}" if own else "", f"{low:.2%} to {high:.2%}"]
        rows.append([name, f"{own:,}", *shown, f"{hit / said:.2%}" if said else ""])
    if len(names) <= SHOWN:
        taken = [["is, said to be", *names]]
        taken += [[name, *map(str, row)] for name, row in zip(names, table, strict=True)]
    else:
        off = np.argsort(-(table * (1 - np.eye(len(names)))), axis=None, kind="stable")[:SHOWN]
        pairs = (np.unravel_index(i, table.shape) for i in off)
        taken = [["is", "said to be", "images"]]
        taken += [[names[a], names[b], str(table[a, b])] for a, b in pairs if table[a, b]]
    return "\n".join([*lines, "", aligned(rows), "", aligned(taken)])


def main() -> None:
    """Prints the held-out loss of a checkpoint."""
    args = read(parser(__doc__, WINDOWS, *PLACES, *ROUNDS))
    from ngc_jax.nn import mesh as meshes
    from ngc_jax.nn.decoder import Decoder
    from ngc_jax.training import evaluation
    from ngc_jax.training.classification import predictions

    rounds, trained = rounds_of(args), opened(args)
    config, data, mesh = trained.config, trained.data(), meshes.single_device()
    model, settle = evaluation.at_rounds(trained.model, config, rounds)
    step = evaluation.compile_eval(model, config, mesh, data, settle)
    amount = data.validation, config.eval.batch_size, args.windows
    found = None
    with doing("evaluating"):
        if config.data.kind == "images":
            how = config.train.compute_dtype, config.eval.batch_size, args.windows
            apply = settle or model.apply
            found = predictions(apply, trained.params, data.validation, *how)
        result = evaluation.held_out(step, trained.params, mesh, *amount)
        if isinstance(model, Decoder) and settle is None:  # measures are of a fixed number
            result |= evaluation.compile_watch(model, config, mesh, data)(trained.params)
    print(f"{args.workdir}, {trained.told}, held out from {data.summary}")
    for name, value in result.items():
        print(f"{name:40} {value:.6f}")
    if found:
        print("", of_images(getattr(data.tokenizer, "symbols", ()), found), sep="\n")


if __name__ == "__main__":
    command(main)
