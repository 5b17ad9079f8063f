"""A complete run of about a minute on two cores, for CI and first tries. It learns little.

python launch.py --config=configs/ngc_tiny.py
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.data.context = 64
    config.model.width, config.model.hidden, config.model.groups, config.model.heads = 32, 96, 4, 2
    config.train.steps, config.train.batch_size, config.train.warmup_steps = 200, 16, 20
    config.train.log_every = 10
    config.eval.every, config.eval.windows, config.eval.batch_size = 50, 64, 64
    config.checkpoint.every_steps = 25
    return config
