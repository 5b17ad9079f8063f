"""dense"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.model.rule = "dense"
    config.model.prelude, config.model.core, config.model.coda = 4, 0, 0
    config.train.learning_rate = 6e-3
    return config
