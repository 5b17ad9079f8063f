"""Held-out loss of a trained model: `python -m ngc_jax.evaluate --workdir=DIR`.

For: `--rounds=8`, or `--rounds=settled`: until a round moves no token's state by `--tolerance` of
its length, `--cap` at most. Not for: the evaluation itself (`training/evaluation.py`).
"""

from ngc_jax.commands.arguments import PLACES, ROUNDS, command, opened, parser, read, rounds_of
from ngc_jax.runtime.fields import Field
from ngc_jax.runtime.output import doing

WINDOWS = Field("windows", 0, "held-out windows or problems, 0: all", "[0, inf)")


def main() -> None:
    """Prints the held-out loss of a checkpoint."""
    args = read(parser(__doc__, WINDOWS, *PLACES, *ROUNDS))
    from ngc_jax.nn import mesh as meshes
    from ngc_jax.nn.decoder import Decoder
    from ngc_jax.training import evaluation

    rounds, trained = rounds_of(args), opened(args)
    config, data, mesh = trained.config, trained.data(), meshes.single_device()
    model, settle = evaluation.at_rounds(trained.model, config, rounds)
    step = evaluation.compile_eval(model, config, mesh, data, settle)
    amount = data.validation, config.eval.batch_size, args.windows
    with doing("evaluating"):
        result = evaluation.held_out(step, trained.params, mesh, *amount)
        if isinstance(model, Decoder) and settle is None:  # measures are of a fixed number
            result |= evaluation.compile_watch(model, config, mesh, data)(trained.params)
    print(f"{args.workdir}, {trained.told}, held out from {data.summary}")
    for name, value in result.items():
        print(f"{name:40} {value:.6f}")


if __name__ == "__main__":
    command(main)
