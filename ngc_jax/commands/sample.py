"""Continue a text: `python -m ngc_jax.sample --workdir=DIR --prompt="def " --tokens=200`.

For: the command line. Not for: the decode itself (`nn/generate.py`), or serving.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.data.tokens import Symbols
from ngc_jax.nn.generate import generate
from ngc_jax.runtime.errors import UserError
from ngc_jax.training.workdir import command, open_trained, parser, rounds


def main() -> None:
    """Print the prompt and its continuation."""
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
    args = arguments.parse_args()
    if args.tokens < 1:
        raise UserError(f"--tokens={args.tokens}: must be 1 or more")
    if args.temperature < 0:
        raise UserError(f"--temperature={args.temperature}: must be 0 or more, for instance 0.8")
    if not 0 < args.top_p <= 1:
        raise UserError(f"--top_p={args.top_p}: must be above 0 and at most 1, for instance 0.95")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed={args.seed}: must be from 0 to 4,294,967,295")
    if args.rounds == "settled":
        raise UserError(
            "--rounds=settled: a cache keeps what each round made, so their number is fixed; give one"
        )
    trained = open_trained(args.workdir, args.step)
    model = trained.model if args.rounds is None else trained.looped.at(rounds(args.rounds))
    tokenizer = trained.tokenizer
    if isinstance(tokenizer, Symbols):
        raise UserError(
            f"{args.workdir} holds a model of data.task={trained.config.data.task!r}: ask ngc_jax.solve"
        )
    prompt = np.array([[tokenizer.mark, *tokenizer.encode(os.fsencode(args.prompt))]], np.int32)
    tokens = generate(
        model,
        trained.params,
        jnp.asarray(prompt),
        args.tokens,
        jax.random.key(args.seed),
        jnp.float32(args.temperature),
        jnp.float32(args.top_p),
    )
    print(args.prompt + tokenizer.decode(tokens[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    command(main)
