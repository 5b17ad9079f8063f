"""The study's measures of one trained run; `run.py` starts it after training, on the same cores.

    python -m experiments.measure STUDY RUN_FOLDER OUT.json

Not for: use by hand.
"""

import argparse
import json
import pathlib

from experiments.study import find
from ngc_jax.commands.arguments import command
from ngc_jax.runtime.files import write_durably


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("study", "run_folder", "out"):
        parser.add_argument(name)
    args = parser.parse_args()
    _, study, _ = find(args.study)
    assert study.measure
    measured = {
        name: float(value) for name, value in study.measure(pathlib.Path(args.run_folder)).items()
    }
    write_durably(pathlib.Path(args.out), json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
