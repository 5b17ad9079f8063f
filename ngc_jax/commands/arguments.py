"""The command line of a work directory: arguments that several commands take, and how one ends.

For: every file of `commands/`. Not for: what a command does.
"""

import argparse
import sys
from collections.abc import Callable

from absl import logging
from etils import epath

from ngc_jax.commands.config_flag import EXTEND, extend
from ngc_jax.runtime.errors import UserError, fail
from ngc_jax.runtime.preemption import INTERRUPTED
from ngc_jax.training.evaluation import Rounds, Settled


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every command on a work directory takes; `read` reads them."""
    arguments = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    arguments.add_argument(
        "--workdir", type=epath.Path, required=True, help="work directory of a run"
    )
    arguments.add_argument(
        "--step", type=int, help="checkpoint to read; default: the newest sound one"
    )
    arguments.add_argument("--extend", action="append", default=[], metavar="FILE.py", help=EXTEND)
    return arguments


def read(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """The values of the command line; files of --extend have been run. Raises UserError."""
    args = arguments.parse_args()
    extend(args.extend)
    return args


def add_rounds(arguments: argparse.ArgumentParser) -> None:
    """Adds what `rounds_of` reads."""
    arguments.add_argument(
        "--rounds", help="of the loop: a number, or 'settled'; default: as in training"
    )
    arguments.add_argument(
        "--tolerance",
        type=float,
        default=Settled.tolerance,
        help="of 'settled', > 0: |change| / |state|",
    )
    arguments.add_argument(
        "--cap", type=int, default=Settled.cap, help="of 'settled', >= 1: rounds at most"
    )


def rounds_of(args: argparse.Namespace) -> Rounds:
    """The rounds that a command line asks for. Raises UserError."""
    if args.tolerance <= 0:
        raise UserError(f"--tolerance={args.tolerance}: must be above 0, for instance 0.01")
    if args.cap < 1:
        raise UserError(f"--cap={args.cap}: must be 1 or more, for instance {Settled.cap}")
    if args.rounds == "settled":
        return Settled(args.tolerance, args.cap)
    return None if args.rounds is None else number_of_rounds(args.rounds)


def number_of_rounds(text: str) -> int:
    """A number of rounds as it is written on a command line. Raises UserError."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--rounds={text}: must be 1 or more, for instance 8")
    return int(text)


def command(main: Callable[[], None]) -> None:
    """Runs a command; a UserError becomes one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)
    try:
        main()
    except UserError as error:
        fail(2, error)
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        sys.exit(1)
