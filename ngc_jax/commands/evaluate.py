"""Held-out loss of a trained model: `python -m ngc_jax.evaluate --workdir=DIR`.

`--rounds=8` runs the loop for another number of rounds than in training. `--rounds=settled` runs it
until a round moves no token's state by `--tolerance` of its length, for `--cap` rounds at most, and
prints how many rounds that took.

For: the command line. Not for: the evaluation itself (`training/evaluation.py`), or tests by
difficulty (`solve.py`).
"""

from ngc_jax.commands.arguments import add_rounds, command, parser, read, rounds_of
from ngc_jax.nn import mesh as meshes
from ngc_jax.nn.decoder import Decoder
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.evaluation import at_rounds, compile_eval, compile_watch, held_out
from ngc_jax.training.load import load


def main() -> None:
    """Prints the held-out loss of a checkpoint."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--windows", type=int, default=0, help="held-out windows or problems; default 0: all"
    )
    add_rounds(arguments)
    args = read(arguments)
    if args.windows < 0:
        raise UserError(f"--windows={args.windows}: must be 1 or more, or 0 for all")
    rounds = rounds_of(args)
    trained = load(args.workdir, args.step)
    config, data, mesh = trained.config, trained.data(), meshes.single_device()
    model, settle = at_rounds(trained.model, config, rounds)
    step = compile_eval(model, config, mesh, data, settle)
    result = held_out(
        step, trained.params, mesh, data.validation, config.eval.batch_size, args.windows
    )
    # The measures are those of a loop with a fixed number of rounds.
    if isinstance(model, Decoder) and settle is None:
        result |= compile_watch(model, config, mesh, data)(trained.params)
    print(f"{args.workdir}, step {trained.step}, held out from {data.summary}")
    for name, value in result.items():
        print(f"{name:40} {value:.6f}")


if __name__ == "__main__":
    command(main)
