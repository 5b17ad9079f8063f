"""Continue a text: `python -m ngc_jax.sample --workdir=DIR --prompt="def " --tokens=200`.

For: the command line. Not for: the sampling itself (`training/load.py`, `nn/model.py`).
"""

import os
import sys

from ngc_jax.commands.arguments import ROUNDS, command, parser, read, rounds_of
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import SEEDS, Field
from ngc_jax.runtime.output import doing

OPTIONS = (
    Field("prompt", "", "text to continue; default: the start of a document"),
    Field("tokens", 200, "tokens to add", "[1, inf)"),
    Field("temperature", 0.8, "of the logits, 0: the likeliest token each time", "[0, inf)"),
    Field("top_p", 0.95, "share of the probability to draw from", "(0, 1]"),
    Field("seed", 0, "of the draw of tokens", SEEDS),
)


def main() -> None:
    """Prints the prompt and its continuation."""
    args = read(parser(__doc__, *OPTIONS, ROUNDS[0]))
    from ngc_jax.training.load import load

    if args.rounds == "settled":
        raise UserError("--rounds=settled: must be a number: a cache keeps what each round made")
    asked = {name: getattr(args, name) for name in ("tokens", "temperature", "top_p", "seed")}
    asked["rounds"] = rounds_of(args)
    prompt = os.fsencode(args.prompt)
    with doing("opening the checkpoint"):
        trained = load(args.workdir, args.step)
    with doing("sampling"):
        text = trained.generate(prompt, **asked)
    print(f"{args.workdir}, {trained.told}", file=sys.stderr)
    print(prompt.decode(errors="replace") + text)


if __name__ == "__main__":
    command(main)
