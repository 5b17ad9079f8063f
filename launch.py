"""Train a model: python launch.py --config=ngc_small [--workdir=DIR] [--config.FIELD=VALUE ...]

Run the same command again to go on with a run that was stopped. Exit codes: 0 done, 1 a failure of
the machine, 2 a mistake in what was asked for, 3 training diverged, 4 it hung (train.hang_exit; run
again), 75 asked to stop (saved; run again), 130 a second Ctrl-C. On several hosts: the same command
on each (docs/pods.md).
"""

import sys

from ngc_jax.runtime import preemption


def main() -> None:
    """Train as the command line asks, and end with one of the exit codes above."""
    preemption.end_at_ctrl_c("interrupted: the same command continues from the last checkpoint")
    # Only now, since these imports take seconds.
    from absl import flags, logging

    from ngc_jax.commands.config_flag import read_config
    from ngc_jax.runtime import multihost
    from ngc_jax.runtime.errors import UserError, end_soon, fail

    logging.set_verbosity(logging.FATAL)  # an error is raised, and printed as one line
    given = flags.DEFINE_string("workdir", None, "Directory of the run. Default: runs/CONFIG.")
    join = multihost.define_flags()
    try:
        config, file = read_config(__doc__ or "")
    except UserError as error:
        fail(2, error)
    # Only now: --help and a mistake need not wait for these.
    from etils import epath

    from ngc_jax.runtime.checkpoint import quiet_failures
    from ngc_jax.runtime.compilation_cache import keep_compiled
    from ngc_jax.training.loop import run
    from ngc_jax.training.run import Diverged
    from ngc_jax.training.workdir import hold, workdir_of

    workdir = epath.Path(given.value or workdir_of(file))
    quiet_failures()
    try:
        join()
        keep_compiled()
        with hold(workdir):
            done = run(config, workdir)
    except (UserError, Diverged) as error:
        code = 2 if isinstance(error, UserError) else 3
        end_soon(code)
        fail(code, error)
    except BaseException as error:
        multihost.leave(error)
        end_soon(1)
        if isinstance(error, OSError):  # a full disk, say; what was saved before is sound
            fail(1, error)
        raise
    code = 0 if done else preemption.EXIT_CODE
    end_soon(code)  # all is saved: whatever a library still waits for
    sys.exit(code)


if __name__ == "__main__":
    main()
