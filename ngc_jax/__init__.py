"""Neuronal Group Communication models, trained from scratch: the public names.

For: `train` and `load` a run, the rules of communication, and the layers of `ngc_jax.nn`; each name
is imported where it is first used. Not for: anything else.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngc_jax import nn
    from ngc_jax.core.rules import RULES, transmit, weights
    from ngc_jax.training.load import load, train

__version__ = "0.2.0"
__all__ = ["RULES", "load", "nn", "train", "transmit", "weights"]
_HOMES = {"load": "training.load", "train": "training.load"}

# `python -m ngc_jax.sample` finds the command in commands/sample.py.
__path__.append(os.path.join(os.path.dirname(__file__), "commands"))

if sys.argv[:1] == ["-m"]:  # while such a command is looked for; it is imported next
    from ngc_jax.runtime.preemption import end_at_ctrl_c

    end_at_ctrl_c()


def __getattr__(name: str) -> Any:
    if name == "nn":
        return importlib.import_module("ngc_jax.nn")
    if name in __all__:
        return getattr(importlib.import_module(f"ngc_jax.{_HOMES.get(name, 'core.rules')}"), name)
    raise AttributeError(f"module 'ngc_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
