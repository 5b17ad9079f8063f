"""Layers for any Flax model, and models: the public names, and nothing else.

Flax modules hold parameters here; every computation that they name lives in `ngc_jax.core`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngc_jax.data.batches import Batch
    from ngc_jax.nn.decoder import Decoder
    from ngc_jax.nn.layers import NGCMLP, NGCAttention, NGCDense
    from ngc_jax.nn.shape import ModelShape

__all__ = ["NGCMLP", "Batch", "Decoder", "ModelShape", "NGCAttention", "NGCDense"]
_LAYERS = dict.fromkeys(("NGCAttention", "NGCDense", "NGCMLP"), "ngc_jax.nn.layers")
_HOMES = {
    **_LAYERS,
    "Batch": "ngc_jax.data.batches",
    "Decoder": "ngc_jax.nn.decoder",
    "ModelShape": "ngc_jax.nn.shape",
}


def __getattr__(name: str) -> Any:
    # When first asked for: a table of settings beside them does not wait for Flax.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
