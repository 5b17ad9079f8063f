"""BDH (the Dragon Hatchling, arXiv 2509.26507) at about the matrix parameters of ngc_small: its nearest relative.

    python launch.py --config=configs/bdh_small.py

248,832 parameters in matrices. Its published sizes are 100 times larger; so is the rate of its neurons to channels,
128, where there are 16 here.
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.model.kind = "bdh"
    config.model.width, config.model.hidden, config.model.heads, config.model.rounds = 72, 1152, 4, 4
    config.train.learning_rate = 5e-3
    config.stability.every = 0
    return config
