"""Train a model: python launch.py --config=configs/ngc_small.py [--workdir=DIR]
[--config.FIELD=VALUE ...]

Run the same command again to go on with a run that was stopped. Exit codes: 0 done, 1 a failure of
the machine, 2 a mistake in what was asked for, 3 training diverged, 4 it hung (train.hang_exit; run
again), 75 asked to stop (saved; run again). On several hosts: the same command on each
(docs/pods.md).
"""

import sys

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from ngc_jax.runtime import multihost
from ngc_jax.runtime.compilation_cache import keep_compiled
from ngc_jax.runtime.errors import UserError, fail
from ngc_jax.runtime.preemption import EXIT_CODE
from ngc_jax.training.loop import run
from ngc_jax.training.run import Diverged
from ngc_jax.training.workdir import hold, workdir_of

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the run.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; default: runs/<config name>."
)
join = multihost.define_flags()


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(2, f"unexpected argument {argv[1]!r}: fields are set by --config.FIELD=VALUE")
    workdir = epath.Path(
        WORKDIR.value or workdir_of(config_flags.get_config_filename(flags.FLAGS["config"]))
    )
    try:
        join()
        keep_compiled()
        with hold(workdir):
            done = run(CONFIG.value, workdir)
    except (UserError, Diverged) as error:
        fail(2 if isinstance(error, UserError) else 3, error)
    except BaseException as error:
        multihost.leave(error)
        if isinstance(error, OSError):  # a full disk, say; what was saved before is sound
            fail(1, error)
        raise
    sys.exit(0 if done else EXIT_CODE)


def parse(argv: list[str]) -> list[str]:
    """Read the flags; a misspelt or mistyped field ends in one line."""
    try:
        rest = flags.FLAGS(argv)
        CONFIG.value.seed  # noqa: B018 (a config file that did not load says so only when it is read)
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections quotes its hint ("did you mean") several times over.
        text = str(error).replace("\\n", " ").replace("\\'", "'")
        fail(2, text[1:-1] if text[:1] == text[-1:] == "'" else text)


if __name__ == "__main__":
    logging.set_verbosity(logging.FATAL)  # what goes wrong is raised, and said in one line
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse)
