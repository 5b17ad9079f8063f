"""ngc_jax: Neuronal Group Communication models, trained from scratch. The public names, and nothing
else.
"""

import os

from ngc_jax.core.rules import RULES, transmit, weights

__version__ = "0.2.0"
__all__ = ["RULES", "transmit", "weights"]

# `python -m ngc_jax.sample` finds the command in commands/sample.py.
__path__.append(os.path.join(os.path.dirname(__file__), "commands"))
