"""The dense baseline of ngc_small: the same data and updates, ordinary weights, no loop.

    python launch.py --config=configs/dense_small.py

851,968 parameters in matrices. Held-out loss after its 1,000 updates: 1.3815 ± 0.0162 nats per
byte, 1.993 bits per byte (three seeds, CPython 3.11.7; experiments/results/match_dense.md).
"""

from ngc_jax.config import base


def get_config():
    config = base()
    config.model.rule = "dense"
    # the depth of the defaults with their rounds
    config.model.prelude, config.model.core, config.model.coda = 4, 0, 0
    config.train.learning_rate = 5e-3  # the best of four, see experiments/results/match_dense.md
    return config
