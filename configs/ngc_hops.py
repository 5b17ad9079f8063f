"""A small NGC model that learns p-hop induction (docs/tasks.md), one round of the loop a hop.

    python launch.py --config=configs/ngc_hops.py
    python -m ngc_jax.solve --workdir=runs/ngc_hops --difficulties=4,8,16,32 --attend=32

46,592 parameters in matrices. It learns one to four hops in 3,000 updates (7 minutes on 2 cores).
With each of three seeds it then solves all of 200 problems of 4, 8, 16 and 32 hops, every letter
right (experiments/results/reasoning/report.md).
"""

from ngc_jax.config import base
from ngc_jax.data.tasks import TASKS


def get_config():
    config = base()
    config.data.task, config.data.low, config.data.high = "hops", 1, 4
    config.data.context, config.data.problems = 52, 50_000
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = 64, 128, 4, 4
    config.model.prelude, config.model.core, config.model.coda = 1, 1, 0
    config.model.attend, config.model.keep, config.model.drive = 32, 0.05, False
    config.model.route, config.model.state_activation = "start", "tanh"
    config.model.qk_gain = 3.0
    config.iteration.rounds, config.iteration.mark = "marked", TASKS["hops"].symbols.index(">")
    config.iteration.high, config.iteration.noise = 4, 0.5
    config.train.steps, config.train.batch_size = 3000, 64
    config.train.learning_rate = config.train.state_learning_rate = 1e-2
    config.stability.every = 0  # it would measure a loop of model.rounds rounds
    return config
