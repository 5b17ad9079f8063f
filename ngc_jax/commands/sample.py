"""Continue a text: `python -m ngc_jax.sample --workdir=DIR --prompt="def " --tokens=200`.

For: the command line. Not for: the sampling itself (`training/writer.py`, `nn/sampling.py`).
"""

import io
import os
import sys
from typing import TYPE_CHECKING, Any

from ngc_jax.commands.arguments import ROUNDS, command, parser, read, rounds_of
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import SEEDS, Field
from ngc_jax.runtime.output import doing, now
from ngc_jax.training.settled import Settled

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ngc_jax.training.load import Trained

DRAWN = (
    Field("temperature", 0.8, "of the logits, 0: the likeliest token each time", "[0, inf)"),
    Field("top_p", 0.95, "share of the probability to draw from", "(0, 1]"),
    Field("top_k", 0, "likeliest tokens to draw from, 0: all", "[0, inf)"),
    Field("min_p", 0.0, "least probability of a token, over that of the likeliest", "[0, 1]"),
    Field("repetition_penalty", 1.0, "above 1: tokens that were there less often", "(0, inf)"),
)
OPTIONS = (
    Field("prompt", "", "text to continue; default: the start of a document"),
    Field("tokens", 200, "tokens to add", "[1, inf)"),
    *DRAWN,
    Field("seed", 0, "of the draw of tokens", SEEDS),
    Field("samples", 1, "continuations, with seeds that follow each other", "[1, inf)"),
    Field("interactive", False, "continue what is typed, line by line"),
)


def main() -> None:
    """Prints the prompt and its continuation, as it is made."""
    given = parser(__doc__, *OPTIONS, ROUNDS[0])
    told = "text to end before, such as $'\\n\\n'; may be given several times"
    given.add_argument("--stop", action="append", default=[], metavar="TEXT", help=told)
    args = read(given)
    from ngc_jax.runtime.compilation_cache import keep_compiled
    from ngc_jax.training.load import load

    if args.rounds == "settled":
        raise UserError("--rounds=settled: must be a number: a cache keeps what each round made")
    if args.interactive and args.samples > 1:
        raise UserError(f"--samples={args.samples}: must be 1 with --interactive")
    asked = {name: getattr(args, name) for name in ("tokens", "seed", "stop")}
    asked |= {field.name: getattr(args, field.name) for field in DRAWN}
    prompt, rounds = os.fsencode(args.prompt), rounds_of(args)
    assert not isinstance(rounds, Settled)
    keep_compiled()
    trained = load(args.workdir, args.step)
    print(f"{args.workdir}, {trained.told}", file=sys.stderr)
    if args.interactive:
        talk(trained, prompt, rounds, asked)
        return
    for number in range(args.samples):
        if number:
            print()
        if args.samples > 1:
            print(f"sample {number + 1}, seed {args.seed + number}:")
        with doing("sampling"):
            made = trained.stream(prompt, rounds=rounds, **asked | {"seed": args.seed + number})
            say(made, prompt.decode(errors="replace"))


def say(made: "Iterator[str]", first: str = "") -> None:
    """Prints pieces of a text as they come, and ends its line."""
    print(first, end="", flush=True)
    for piece in made:
        now("")  # or a wait would be told in the middle of a line
        print(piece, end="", flush=True)
    print()


def talk(trained: "Trained", prompt: bytes, rounds: int | None, asked: dict[str, Any]) -> None:
    """Continues a text that two write in turn: each line that is typed, then the model.

    An empty line lets the model write on. Ctrl-C ends its turn, the end of the input all.
    """
    from ngc_jax.training.writer import Writer, sampled

    drawn, writer = sampled(**asked), Writer(trained, rounds)
    writer.read(trained.encode(prompt), asked["tokens"], whole=False)
    print(
        "a line is read and continued; empty: go on; Ctrl-C: enough; Ctrl-D: end", file=sys.stderr
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is not UTF-8, as in --prompt
    now("")  # who types is not told of waits
    turn = 0
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line:
            own = trained.encode(os.fsencode(line) + b"\n")[1:]  # without a document's mark
            writer.read(own, asked["tokens"], whole=False)
        try:
            with doing("sampling"):
                seed = (asked["seed"] + turn) % 2**32
                say(writer.write(asked["tokens"], drawn, seed, asked["stop"]))
        except KeyboardInterrupt:
            print()
        turn += 1


if __name__ == "__main__":
    command(main)
