"""Train a model: `ngc train ngc_small [--workdir=DIR] [--model.groups=16 ...]`.

A config is a name, a FILE.py, or stored:DIR, a run to begin another one like it. Run the same
command again to go on with a run that was stopped. Exit codes: 0 done, 1 a failure of the machine,
2 a mistake in what was asked for, 3 training diverged, 4 it hung (train.hang_exit; run again), 75
asked to stop (saved; run again), 130 a second Ctrl-C.

For: the command, which `launch.py` is too. Not for: training itself (`training/loop.py`).
"""

import sys

from ngc_jax.runtime import allocation, output, preemption


def main(about: str | None = __doc__) -> None:
    """Trains as the command line asks, and ends with one of the exit codes above."""
    preemption.end_at_ctrl_c("interrupted: the same command continues from the last checkpoint")
    output.begin(goes_on=True)
    allocation.keep_freed()
    # Only now, since these imports take seconds.
    from absl import flags, logging

    from ngc_jax.runtime.errors import UserError, end_soon, fail, of_machine

    try:
        from ngc_jax.commands.config_flag import read_config
        from ngc_jax.runtime import multihost
    except ValueError as error:
        fail(2, of_machine(error) or error)

    logging.set_verbosity(logging.FATAL)  # an error is raised, and printed as one line
    given = flags.DEFINE_string("workdir", None, "Directory of the run. Default: runs/CONFIG.")
    join = multihost.define_flags()
    try:
        config, file = read_config(about or "")
    except UserError as error:
        fail(2, error)
    # Only now: --help and a mistake need not wait for these.
    from ngc_jax.runtime.checkpoint import quiet_failures
    from ngc_jax.runtime.compilation_cache import keep_compiled
    from ngc_jax.runtime.files import place
    from ngc_jax.training.loop import run
    from ngc_jax.training.run import Diverged
    from ngc_jax.training.workdir import hold, workdir_of

    quiet_failures()
    try:
        workdir = place(given.value or workdir_of(file))
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
        if told := of_machine(error):
            fail(2, told)
        if isinstance(error, OSError):  # a full disk, say; what was saved before is sound
            fail(1, error)
        raise
    code = 0 if done else preemption.EXIT_CODE
    end_soon(code)  # all is saved: whatever a library still waits for
    sys.exit(code)


if __name__ == "__main__":
    main()
