"""The config on a command line: `--config=NAME` or `--config=FILE`, and `--config.FIELD=VALUE`.

Or shorter, `NAME --FIELD=VALUE`. For: `train`, `launch.py` and `collectives`. Not for: the fields
themselves (`config.py`).
"""

import itertools
import re
import sys
import textwrap
from functools import partial

from absl import flags
from ml_collections import ConfigDict, config_flags

from ngc_jax.commands.arguments import EXTEND, extend
from ngc_jax.config import SECTIONS, config_names, config_path
from ngc_jax.runtime import multihost
from ngc_jax.runtime.errors import UserError
from ngc_jax.runtime.fields import help_text, unknown

# The dashes of a field that is given without "config.": with a section, or one that has none.
TOP = "|".join(field.name for field in SECTIONS[0].fields)
INIT = "--config.train.init_from"  # which may be given as --init_from
SHORT = re.compile(rf"^--?(?=({TOP})(=|$)|(?!(no)?config\.)[a-z]\w*\.)")


def read_config(about: str, own: flags.FlagValues = flags.FLAGS) -> tuple[ConfigDict, str]:
    """Reads the command line; returns the config, locked, and its file, "FILE" or "FILE:ARGUMENT".

    The flags in `own` are read too; `--help` prints `about`, flags and fields. Raises UserError.
    """
    flags.DEFINE_multi_string("extend", [], EXTEND, flag_values=own)
    if {"--help", "-help", "-h", "--helpfull"} & {*sys.argv}:
        print(f"{about.strip()}\n\nflags:\n{_flags(own)}\n\nfields: --SECTION.FIELD=VALUE")
        print(help_text(SECTIONS))
        sys.exit(0)
    given, rest = _split(sys.argv[1:])
    extend(word.partition("=")[2] for word in rest if re.match("--?extend=", word))
    begins = [word.partition("=")[2] for word in rest if word.startswith(f"{INIT}=")]
    if begins and not given:  # another run like the one that it begins with
        from ngc_jax.training.workdir import at_step

        given = f"stored:{at_step(begins[-1])[0]}"
    if not given:
        raise UserError(f"--config is missing: give a file, or one of {', '.join(config_names())}")
    name, colon, argument = given.partition(":")
    file = f"{config_path(name)}{colon}{argument}"
    argv = [sys.argv[0], f"--config={file}", *rest]
    how = {"lock_config": True, "flag_values": own, "sys_argv": argv}
    chosen = config_flags.DEFINE_config_file("config", None, **how)
    try:
        left = own(argv)[1:]
        config: ConfigDict = chosen.value
        config.seed  # noqa: B018 (a file that did not load says so when it is read)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(_explained(error, argv)) from error
    if left:
        raise UserError(f"unexpected argument {left[0]!r}: fields are set by --FIELD=VALUE")
    return config, file


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The last value of --config, or the first word; and the others, fields as `--config.FIELD`."""
    rest: list[str] = []
    value, words = "", iter(arguments)
    for word in words:
        if found := re.fullmatch(r"--?config(=(.*))?", word, re.DOTALL):
            value = found[2] if found[1] else next(words, "")
        elif not value and not rest and not word.startswith("-"):
            value = word
        else:
            word = re.sub(r"^--?init_from(?==|$)", INIT, word)
            rest.append(SHORT.sub("--config.", word))
    return value, rest


def _explained(error: Exception, argv: list[str]) -> str:
    """One line of what went wrong, with the field, its value, and a value that works."""
    fields = {section.path(field.name): field for section in SECTIONS for field in section.fields}
    given = re.findall(r"^--?(?:no)?config\.([^=]+)", "\n".join(argv), re.MULTILINE)
    missing = [unknown(path, SECTIONS) for path in given if path not in fields]
    if missing and isinstance(error, (AttributeError, KeyError)):
        return "; ".join(missing)
    text = str(error)
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", text)
    # ml_collections passes on the traceback of a config file that fails, as text
    file = argv[1].removeprefix("--config=").partition(":")[0]
    lines = re.findall(rf'File "{re.escape(file)}", (line \d+), .*\n +(.*)', text)
    where = f"{file}, {lines[-1][0]}: " if lines else ""
    found = re.search(r"\.([\w.]+) *= *(.*)()", lines[-1][1]) if lines else found
    if found and found[1] in fields:
        return f"{where}{found[1]}={found[2]}: must be {fields[found[1]].fault(None)}"
    return f"{where}{text.strip().rpartition(chr(10))[2]}"


def _flags(own: flags.FlagValues) -> str:
    """The flags of a command and of this package, a line each."""
    modules = own.flags_by_module_dict()
    ours = (sys.argv[0], "ngc_jax.commands.train_model", __name__, multihost.__name__)
    told = {"--config=NAME": "config of configs/NAME.py; or a file with get_config()"}
    told["--init_from=DIR"] = (
        "parameters to begin with, of a run; DIR:STEP. Default config: its own."
    )
    for flag in itertools.chain(*(modules.get(name, []) for name in ours)):
        default = "" if flag.default in (None, []) else f" Default: {flag.default}."
        told[f"--{flag.name}"] = flag.help.partition(";\n")[0] + default
    fill = partial(textwrap.fill, width=100, subsequent_indent=" " * 21)
    return "\n".join(fill(text, initial_indent=f"{name:21}") for name, text in told.items())
