"""The dense baseline of ngc_small: the same decoder, data and steps, with ordinary weights and no loop.

    python launch.py --config=configs/dense_small.py

RESULT
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.model.rule = "dense"
    config.model.prelude, config.model.core, config.model.coda = 4, 0, 0  # as deep as ngc_small with its rounds
    config.train.learning_rate = 2.5e-3  # the best of four, see experiments/results/match_dense.md
    return config
