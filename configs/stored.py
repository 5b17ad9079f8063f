"""The config of a run that there is, from its work directory, to begin another one like it.

    python launch.py --config=configs/stored.py:runs/small --workdir=runs/healed \
        --config.train.init_from=runs/small --config.train.teacher=runs/big

Places that the directory names (docs/trust.md) are left out: type them again. Without a directory
it is the defaults.
"""

from ngc_jax.config import base
from ngc_jax.data.settings import withhold
from ngc_jax.runtime.files import place
from ngc_jax.training.workdir import read_config


def get_config(workdir=""):
    config = read_config(place(workdir)) if workdir else base()
    withhold(config.data)
    config.train.init_from = config.train.teacher = ""
    config.train.imitate, config.train.temperature = "outputs", 1.0
    return config
