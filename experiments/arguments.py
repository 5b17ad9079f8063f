"""The command lines that run a study, apart from what they run: `--help` does not wait for that.

For: `run.py`, `compare.py` and `ngc study --help`. Not for: their meaning (`run.py`).
"""

import argparse
import os
from collections.abc import Callable

from ngc_jax.runtime.files import expand


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number."""

    def number(text: str) -> int:
        try:
            if (value := int(text)) >= least:
                return value
        except ValueError:
            pass
        wants = f"must be a whole number, {least} or more, for instance {least}"
        raise argparse.ArgumentTypeError(f"{text!r}: {wants}")

    return number


def arguments(about: str | None) -> argparse.ArgumentParser:
    """The arguments of all commands that run a study."""
    parser = argparse.ArgumentParser(
        description=(about or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--workdir", type=expand, help="default: runs/STUDY")
    parser.add_argument(
        "--jobs",
        type=at_least(1),
        default=len(os.sched_getaffinity(0)),
        help="runs at a time; default: number of cores",
    )
    parser.add_argument(
        "--index", type=at_least(0), help="run only groups index, index + count, ..."
    )
    told = "of parts, see --index; default: 1"
    parser.add_argument("--count", type=at_least(1), default=1, help=told)
    parser.add_argument("--dry", action="store_true", help="print the runs, and run nothing")
    parser.add_argument(
        "--report", action="store_true", help="report the results so far, and run nothing"
    )
    return parser


def of_a_study() -> argparse.ArgumentParser:
    """The arguments of `run.py`, and of `ngc study`."""
    parser = arguments("Run a study: train the missing runs, continue from any state, and report.")
    parser.add_argument("study", help="name of a file of experiments/, or path of your file")
    parser.add_argument(
        "--larger", action="store_true", help="use the study's setting for an accelerator"
    )
    fields = "--config.FIELD=VALUE sets a field of all runs; such a study needs its own folder"
    parser.epilog = fields
    return parser
