"""The dense baseline of ngc_base: the same decoder and data, 283 M parameters in matrices, and no
loop.

    python launch.py --config=configs/dense_base.py

It has not been trained yet, so there is no result to quote.
"""

from configs.ngc_base import get_config as ngc_base


def get_config():
    config = ngc_base()
    config.model.rule = "dense"
    # as deep as ngc_base with its rounds
    config.model.prelude, config.model.core, config.model.coda = 22, 0, 0
    return config
