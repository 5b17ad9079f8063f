"""Held-out loss of a trained model: `python -m ngc_jax.evaluate --workdir=DIR`, over all that is
held out.

`--rounds=8` runs the loop for another number of rounds than the config says; `--rounds=settled`
until a round moves no token's state by `--tolerance` of its length, for `--cap` rounds at most, and
says how many rounds that were.

For: the command line. Not for: the evaluation itself (`training/evaluation.py`), or tests by
difficulty (`solve.py`).
"""

import argparse
from functools import partial

from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.nn.model import LanguageModel
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.evaluation import as_trained, compile_eval, compile_watch, data_of, held_out
from ngc_jax.training.rounds import Apply
from ngc_jax.training.workdir import Trained, command, open_trained, parser, rounds

CAP = 64  # rounds at most where the state says how many


def ask_rounds(arguments: argparse.ArgumentParser) -> None:
    """Add what `run_for` reads of a command line."""
    arguments.add_argument(
        "--rounds", help="of the loop: a number, or 'settled'; default: as in training"
    )
    arguments.add_argument(
        "--tolerance", type=float, default=0.01, help="of 'settled', > 0: |change| / |state|"
    )
    arguments.add_argument(
        "--cap", type=int, default=CAP, help="of 'settled', >= 1: rounds at most"
    )


def run_for(trained: Trained, args: argparse.Namespace) -> tuple[LanguageModel, Apply | None]:
    """The model for the rounds that `args` ask for, and what stands for its `apply` where they
    differ by token.
    """
    if args.tolerance <= 0:
        raise UserError(f"--tolerance={args.tolerance}: must be above 0, for instance 0.01")
    if args.cap < 1:
        raise UserError(f"--cap={args.cap}: must be 1 or more, for instance {CAP}")
    if args.rounds == "settled":
        return trained.model, partial(trained.looped.settle, tolerance=args.tolerance, cap=args.cap)
    if args.rounds is not None:
        return trained.looped.at(rounds(args.rounds)), None
    return as_trained(trained)


def main() -> None:
    """Print the held-out loss of a checkpoint."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--windows", type=int, default=0, help="held-out windows or problems; default 0: all"
    )
    ask_rounds(arguments)
    args = arguments.parse_args()
    if args.windows < 0:
        raise UserError(f"--windows={args.windows}: must be 1 or more, or 0 for all")
    trained = open_trained(args.workdir, args.step)
    config = trained.config
    model, settle = run_for(trained, args)
    data = data_of(trained, args.workdir)
    mesh = meshes.single_device()
    step = compile_eval(model, config, mesh, data, settle)
    result = held_out(
        step, trained.params, mesh, data.validation, config.eval.batch_size, args.windows
    )
    # what is watched is a loop of a fixed number of rounds
    if isinstance(model, Decoder) and settle is None:
        result |= compile_watch(model, config, mesh, data)(trained.params)
    print(f"{args.workdir}, step {trained.step}, held out from {data.summary}")
    for name, value in result.items():
        print(f"{name:40} {value:.6f}")


if __name__ == "__main__":
    command(main)
