"""NGC language model on the Python library source.

python launch.py --config=configs/ngc_small.py
"""

from ngc_jax.config import base


def get_config():
    config = base()  # its defaults are this run
    return config
