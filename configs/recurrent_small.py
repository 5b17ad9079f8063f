"""A recurrent NGC language model on the same text: two cells that hear it byte by byte, and remember in their states.

python launch.py --config=configs/recurrent_small.py
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.model.kind = "recurrent"
    config.model.prelude, config.model.core, config.model.coda = 0, 2, 0
    config.model.rounds = 1
    config.stability.every = 0  # there are no stages to watch
    return config
