"""Continue a text: `python -m ngc_jax.sample --workdir=DIR --prompt="def " --tokens=200`.

For: the command line. Not for: the sampling itself (`training/load.py`, `nn/generate.py`), or
serving.
"""

import os

from ngc_jax.commands.arguments import command, number_of_rounds, parser, read
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.load import load


def main() -> None:
    """Prints the prompt and its continuation."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--prompt", default="", help="text to continue; default: the start of a document"
    )
    arguments.add_argument("--tokens", type=int, default=200, help="tokens to add, >= 1")
    arguments.add_argument(
        "--temperature", type=float, default=0.8, help=">= 0; 0 = the likeliest token each time"
    )
    arguments.add_argument("--top_p", type=float, default=0.95, help="in (0, 1]")
    arguments.add_argument("--rounds", help="of the loop, >= 1; default: model.rounds")
    arguments.add_argument("--seed", type=int, default=0)
    args = read(arguments)
    if args.rounds == "settled":
        raise UserError(
            "--rounds=settled: a cache keeps what each round made, so their number is fixed; give "
            "a number"
        )
    rounds = None if args.rounds is None else number_of_rounds(args.rounds)
    text = load(args.workdir, args.step).generate(
        os.fsencode(args.prompt),
        tokens=args.tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        rounds=rounds,
    )
    print(args.prompt + text)


if __name__ == "__main__":
    command(main)
