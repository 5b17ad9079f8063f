"""Train a model: python launch.py --config=ngc_small [--workdir=DIR] [--config.FIELD=VALUE ...]

Run the same command again to go on with a run that was stopped. Exit codes: 0 done, 1 a failure of
the machine, 2 a mistake in what was asked for, 3 training diverged, 4 it hung (train.hang_exit; run
again), 75 asked to stop (saved; run again), 130 a second Ctrl-C. On several hosts: the same command
on each (docs/pods.md).
"""

from ngc_jax.commands.train_model import main

if __name__ == "__main__":
    main(__doc__)
