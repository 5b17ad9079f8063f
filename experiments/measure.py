"""Measure one trained run as its study asks: what `run.py` starts after a training run, on that
run's cores.

    python -m experiments.measure STUDY RUN_FOLDER OUT.json

Not for: by hand.
"""

import json
import pathlib
import sys

from experiments.study import find
from ngc_jax.commands.arguments import command
from ngc_jax.runtime.files import write_durably


def main() -> None:
    reference, workdir, out = sys.argv[1:]
    _, study, _ = find(reference)
    assert study.measure
    measured = {name: float(value) for name, value in study.measure(pathlib.Path(workdir)).items()}
    write_durably(pathlib.Path(out), json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
