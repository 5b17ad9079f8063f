"""What a run costs, what it runs on, and what its numbers depend on.

For: what a run prints before it begins, and the peak of its devices. Not for: counting.
"""

import sys
from typing import Any

import flax
import jax
import optax
from jax.sharding import Mesh

from ngc_jax import count
from ngc_jax.nn.model import LanguageModel
from ngc_jax.training.rounds import Iteration

PEAKS = {  # FLOPs a second of one device in bfloat16, without sparsity, by the vendors' data sheets
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak(dtype: str, kind: str = "") -> float | None:
    """Peak FLOPs a second of a device of this kind (default: here) in bfloat16; None: not known."""
    kind = kind or jax.devices()[0].device_kind
    found = (peak for name, peak in PEAKS.items() if kind.startswith(name))
    return next(found, None) if dtype == "bfloat16" else None


def update_flops(model: LanguageModel, params: Any, batch: Any, how: Iteration | None) -> float:
    """FLOPs of an update, the backward pass twice the forward; params and batch may be abstract."""
    plain = 3 * count.forward_flops(model.apply, params, batch)
    return how.flops(params, batch) if how else plain


def costs(model: LanguageModel, params: Any, flops: float, compiled: Any) -> str:
    """One line: counted parameters, FLOPs of an update, and the compiled update's memory."""
    stored = count.parameters(params, model.param_info())
    return (
        f"model: {stored.total:,} parameters, {stored.matrices:,} in matrices, "
        f"{stored.embeddings:,} in embeddings; {count.generated_weights(model):,} weights "
        f"generated per forward; {flops / 1e9:.2f} GFLOPs per step; "
        f"{count.peak_memory(compiled) / 2**20:.0f} MiB peak per device"
    )


def devices(mesh: Mesh) -> str:
    """For instance "8 x cpu (data 4, group 2)"."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {jax.devices()[0].device_kind}" + (f" ({axes})" if axes else "")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    own = sys.modules["ngc_jax"]  # loaded before all of its parts, which stand below it
    return {module.__name__: module.__version__ for module in (own, jax, flax, optax)}
