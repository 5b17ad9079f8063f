"""Every field at its default: a plain NGC model on the source of this Python's library, from which
studies differ.

    python launch.py --config=configs/defaults.py

264,192 parameters in matrices: as wide and as deep as dense_small, 1.4% ± 2.9% behind it (see
experiments/results/match_dense.md). The best form found is configs/ngc_small.py.
"""

from ngc_jax.config import base


def get_config():
    return base()
