"""The command line of a work directory: arguments that several commands take, and how one ends.

For: every file of `commands/`. Not for: what a command does.
"""

import argparse
import math
import os
import runpy
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from absl import logging

from ngc_jax.runtime import output
from ngc_jax.runtime.errors import UserError, fail, of_machine
from ngc_jax.runtime.fields import LARGEST, Field
from ngc_jax.runtime.files import Path, place
from ngc_jax.runtime.preemption import INTERRUPTED
from ngc_jax.training.settled import Settled

# --help need not wait for these; nor do the files of commands import such at once.
if TYPE_CHECKING:
    from jax.sharding import Mesh

    from ngc_jax.data.batches import Batch
    from ngc_jax.training.evaluation import Rounds
    from ngc_jax.training.load import Trained

EXTEND = "your own file, such as the config of the run, that registers a rule, task or model"
ROUNDS = (
    Field("rounds", "", "of the loop: a number, or 'settled'; default: as in training"),
    Field("tolerance", Settled.tolerance, "of 'settled': |change| / |state|", "(0, inf)"),
    Field("cap", Settled.cap, "of 'settled': rounds at most", "[1, inf)"),
)
PLACES = (
    Field("data_path", "", "where the run's text is: as data.path"),
    Field("validation_path", "", "where its held-out text is, if it has data.validation_path"),
    Field("tfds_dir", "", "where the run's TFDS set is: the folder of its sets"),
    Field("trust", False, "use the places that the work directory names (docs/trust.md)"),
)


def parser(description: str | None, *options: Field) -> argparse.ArgumentParser:
    """The arguments of every command on a work directory, and `options`, for `read`."""
    arguments = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    arguments.add_argument("--workdir", type=place, required=True, help="of a run")
    told = "checkpoint; default: the newest sound one, or the best (checkpoint.best)"
    arguments.add_argument("--step", type=int, help=told)
    arguments.add_argument("--extend", action="append", default=[], metavar="FILE.py", help=EXTEND)
    for option in options:
        told, default = ", ".join(filter(None, [option.help, option.range()])), option.default
        told += f"; default: {default}" if default not in ("", False) else ""
        how: dict[str, Any] = {"type": partial(_typed, option), "default": default}
        how = {"action": "store_true"} if default is False else how
        arguments.add_argument(f"--{option.name}", help=told, **how)
    arguments.set_defaults(options=options)
    return arguments


def _typed(option: Field, text: str) -> Any:
    try:
        return type(option.default)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {option.fault(text)}") from error


def _refuse(arguments: argparse.ArgumentParser, told: str) -> NoReturn:
    """In the place of argparse's own, which prints the usage first."""
    fail(2, f"{told} (--help says more)")


def read(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """The values of the command line; files of --extend have been run. Raises UserError."""
    args = arguments.parse_args()
    for option in args.options:
        value = getattr(args, option.name)
        if fault := option.fault(value):
            raise UserError(f"--{option.name}={value}: must be {fault}")
    extend(args.extend)
    return args


def extend(files: Iterable[str]) -> None:
    """Runs a user's Python files, which fill our tables. Raises UserError for an unreadable one."""
    for file in files:
        try:
            runpy.run_path(str(place(file)))
        except OSError as error:
            raise UserError(f"--extend={file} cannot be read: {error}") from error


def opened(args: argparse.Namespace, mesh: "Mesh | None" = None) -> "Trained":
    """The run of a command line with the options PLACES, on a mesh. Raises UserError."""
    from ngc_jax.runtime.compilation_cache import keep_compiled
    from ngc_jax.training.load import load

    keep_compiled()
    places = {option.name: getattr(args, option.name) for option in PLACES}
    return load(args.workdir, args.step, **places, mesh=mesh)


def mesh_of(text: str) -> "Mesh":
    """The mesh of some of the devices here, from "data:2,fsdp:2". Raises UserError."""
    import jax
    from ml_collections import ConfigDict

    from ngc_jax.nn import mesh as meshes

    sizes = read_mesh(text)
    count, here = math.prod(sizes.values()), len(jax.devices())
    if count > here:
        raise UserError(f"--mesh={text}: must be of {here} devices at most, those that are here")
    return meshes.make_mesh(ConfigDict(sizes), jax.devices()[:count])


def read_mesh(text: str) -> dict[str, int]:
    """{"data": 1, "fsdp": 2, "group": 4} from "fsdp:2,group:4". Raises UserError."""
    sizes = dict.fromkeys(("data", "fsdp", "group"), 1)
    for item in text.split(","):
        name, _, size = item.partition(":")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            wants = "must be some of data:N,fsdp:N,group:N, for instance group:8"
            raise UserError(f"--mesh={text}: {wants}")
        sizes[name] = int(size)
    return sizes


def rounds_of(args: argparse.Namespace) -> "Rounds":
    """The rounds that the options ROUNDS ask for. Raises UserError."""
    if args.rounds == "settled":
        return Settled(args.tolerance, args.cap)
    if args.rounds and not (args.rounds.isdecimal() and 0 < int(args.rounds) < LARGEST):
        raise UserError(f"--rounds={args.rounds}: must be 1 or more, for instance 8")
    return int(args.rounds) if args.rounds else None


def page_folder(args: argparse.Namespace, name: str) -> Path:
    """The folder of a command's page, --out or DIR/NAME, made where it is missing. UserError."""
    from ngc_jax.analysis.page import unwritable

    out: Path = args.out or args.workdir / name
    if not args.out and os.path.islink(out):
        raise UserError(f"{out} is a link, which is not followed: give --out=FOLDER")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from error
    return out


def held_out(trained: "Trained", most: int) -> "Batch":
    """Up to so many held-out windows, evenly spread. UserError for one, which has no interval."""
    from ngc_jax.data.batches import held_out_batches

    examples = trained.data().validation
    count = min(most, len(examples))
    if count < 2:
        given = f"data.context={trained.config.data.context}"
        raise UserError(f"the held-out data have {count} window of {given}: an interval needs 2")
    return next(held_out_batches(examples, batch_size=count, limit=count))[0]


def command(main: Callable[[], None], goes_on: bool = False) -> None:
    """Runs a command; a UserError becomes one line and exit code 2. goes_on: see `output.begin`."""
    output.begin(goes_on)
    argparse.ArgumentParser.error = _refuse  # type: ignore[method-assign,assignment]
    logging.set_verbosity(logging.ERROR)
    try:
        try:
            main()
        except SystemExit:  # of --help, which has printed
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except UserError as error:
        fail(2, error)
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted")
    except BrokenPipeError:
        output.discard()
        sys.exit(1)
    except OSError as error:  # a full disk, say
        output.discard()
        fail(1, error)
    except (AssertionError, MemoryError, RuntimeError, ValueError) as error:
        if told := of_machine(error):
            fail(2, told)
        raise
