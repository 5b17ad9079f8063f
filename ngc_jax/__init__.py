"""ngc_jax: Neuronal Group Communication models, trained from scratch. The public names, and nothing else."""

from ngc_jax.core.rules import RULES, transmit, weights

__version__ = "0.1.0"
__all__ = ["RULES", "transmit", "weights"]
