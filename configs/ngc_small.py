"""An NGC language model on the source of this Python's standard library, in a few minutes on two cores.

    python launch.py --config=configs/ngc_small.py

RESULT
"""

from ngc_jax.config import base


def get_config():
    return base()  # its defaults are this run
