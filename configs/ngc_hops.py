"""A small NGC model that learns to hop, one to four times (docs/tasks.md), in minutes on two cores.

python launch.py --config=configs/ngc_hops.py
python -m ngc_jax.solve --workdir=runs/ngc_hops
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
