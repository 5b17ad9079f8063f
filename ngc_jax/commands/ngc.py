"""`ngc COMMAND ...`: every command of this package by one word, as installed.

For: `ngc sample --workdir=DIR`, which is `python -m ngc_jax.sample --workdir=DIR`. Not for: what a
command does (the other files here).
"""

import ast
import difflib
import pathlib
import runpy
import sys

from ngc_jax.runtime import output
from ngc_jax.runtime.errors import fail
from ngc_jax.runtime.preemption import end_at_ctrl_c

HERE = pathlib.Path(__file__).parent
HELPERS = {"__init__", "arguments", "config_flag", "ngc"}
# names that are taken
FILES = {"import": "import_model", "convert": "convert_model", "train": "train_model"}
COMMANDS = {**FILES} | {
    path.stem: path.stem
    for path in sorted(HERE.glob("*.py"))
    if path.stem not in HELPERS | {*FILES.values()}
}


def main() -> None:
    """Runs the command that the first word names."""
    end_at_ctrl_c()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        output.begin(goes_on=True)
        print("usage: ngc COMMAND ...; ngc COMMAND --help says more\n")
        for word, file in sorted(COMMANDS.items()):
            told = ast.get_docstring(ast.parse((HERE / f"{file}.py").read_bytes())) or ""
            print(f"  {word:12} {told.partition(':')[0]}")
        sys.exit()
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        fail(2, f"there is no command {name!r}: give one of {', '.join(sorted(COMMANDS))}{hint}")
    sys.argv = [f"ngc {name}", *rest]
    runpy.run_module(f"ngc_jax.commands.{COMMANDS[name]}", run_name="__main__")


if __name__ == "__main__":
    main()
