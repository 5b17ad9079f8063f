"""A small recurrent NGC model that learns parity of up to 39 bits and is exact at 5,000 bits.

    python launch.py --config=configs/recurrent_parity.py
    python -m ngc_jax.solve --workdir=runs/recurrent_parity --difficulties=10,39,1000,5000

7,168 parameters in matrices, 600 updates (a minute on one core). With each of three seeds it then
solves all of 200 problems of 1,000 bits, and all of 200 of 5,000 bits.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.task, config.data.low, config.data.high = "parity", 1, 39
    config.data.context, config.data.problems = 40, 50_000
    config.model.kind = "recurrent"
    config.model.prelude, config.model.core, config.model.coda, config.model.rounds = 0, 1, 0, 1
    config.model.width, config.model.hidden, config.model.groups, config.model.p_inter = (
        32,
        64,
        4,
        2,
    )
    config.train.steps, config.train.batch_size = 600, 64
    config.train.learning_rate = config.train.state_learning_rate = 3e-3
    config.stability.every = 0  # there are no stages to measure
    return config
