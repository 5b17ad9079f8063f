"""The dense baseline of ngc_base: the same data, 283 M parameters in matrices, no loop.

    python launch.py --config=configs/dense_base.py

It has not been trained yet, so there is no result to quote.
"""

from ngc_jax.config import named


def get_config():
    config = named("ngc_base")
    config.model.rule = "dense"
    # the depth of ngc_base with its rounds
    config.model.prelude, config.model.core, config.model.coda = 22, 0, 0
    return config
