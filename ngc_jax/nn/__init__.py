"""Layers for any Flax model, and models: the public names, each imported when first asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngc_jax.data.batches import Batch
    from ngc_jax.nn.decoder import Decoder
    from ngc_jax.nn.layers import NGCMLP, NGCAttention, NGCDense
    from ngc_jax.nn.recurrent import Recurrent
    from ngc_jax.nn.shape import ModelShape

__all__ = ["NGCMLP", "Batch", "Decoder", "ModelShape", "NGCAttention", "NGCDense", "Recurrent"]
_HOMES = {"Batch": "data.batches", "Decoder": "nn.decoder"}
_HOMES |= {"ModelShape": "nn.shape", "Recurrent": "nn.recurrent"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"ngc_jax.{_HOMES.get(name, 'nn.layers')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
