"""A small NGC model that learns to hop, one to four times (docs/tasks.md), in minutes on two cores.

python launch.py --config=configs/ngc_hops.py
python -m ngc_jax.solve --workdir=runs/ngc_hops

47,872 parameters. After its 1,200 updates (7 minutes) 99.8% of 5,000 held-out problems are solved, all of 200 at each
of 1, 2 and 4 hops, and none of 200 at 8: with five rounds always it does not go beyond its training. One seed.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.task, config.data.low, config.data.high = "hops", 1, 4
    config.data.context, config.data.problems = 36, 50_000
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = 64, 128, 4, 4
    config.model.prelude, config.model.core, config.model.coda, config.model.rounds = 1, 1, 0, 5
    config.train.steps, config.train.batch_size = 1200, 64
    config.train.learning_rate = config.train.state_learning_rate = 5e-3
    return config
