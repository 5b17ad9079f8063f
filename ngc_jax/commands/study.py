"""Run a study and report it: `ngc study NAME_OR_FILE.py --workdir=DIR`.

For: studies of `experiments/`, and your own; other programs there too, as in `ngc study compare
--protocol=small`. Wherever this package is installed, they import each other, and your file imports
them, as `experiments.X`. Not for: how runs are made (`experiments/run.py`).
"""

import re
import runpy
import sys

from ngc_jax.runtime import output
from ngc_jax.runtime.files import ROOT


def main() -> None:
    """Runs the program of `experiments/` that the first word names, else the study that it is."""
    output.begin(goes_on=True)
    sys.path.insert(0, str(ROOT))
    name, *rest = sys.argv[1:] or ["--help"]
    file = ROOT / "experiments" / f"{name}.py"
    own = bool(re.fullmatch(r"\w+", name)) and file.is_file() and b"__main__" in file.read_bytes()
    sys.argv = [f"ngc study {name}", *rest] if own else ["ngc study", name, *rest]
    if not own and {"-h", "--help"} & {*sys.argv}:
        runpy.run_module("experiments.arguments")["of_a_study"]().print_help()
        sys.exit()
    runpy.run_module(f"experiments.{name if own else 'run'}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
