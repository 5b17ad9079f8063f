"""What a run costs, what it runs on, and what its numbers depend on, in words.

For: the lines that a run says of itself before it begins. Not for: counting (`count.py`).
"""

from typing import Any

import flax
import jax
import optax
from jax.sharding import Mesh

import ngc_jax
from ngc_jax import count
from ngc_jax.iteration import Iteration
from ngc_jax.nn.model import LanguageModel


def costs(model: LanguageModel, like: Any, batch: Any, compiled: Any, iteration: Iteration | None) -> str:
    """What the run costs, in one line: counted parameters and FLOPs, and the compiled step's memory."""
    stored = count.parameters(like.params)
    inputs = jax.ShapeDtypeStruct((batch.shape[0], batch.shape[2]), batch.dtype)
    # A step's FLOPs by the usual convention: the backward pass is twice the forward; recomputation is not counted.
    forward = count.forward_flops
    flops = iteration.flops(like.params, inputs) if iteration else 3 * forward(model.apply, like.params, inputs)
    return (
        f"model: {stored.total:,} parameters, {stored.matrices:,} in matrices, {stored.embeddings:,} in embeddings; "
        f"{count.generated_weights(model):,} weights generated per forward; {flops / 1e9:.2f} GFLOPs per step; "
        f"{count.peak_memory(compiled) / 2**20:.0f} MiB peak per device"
    )


def devices(mesh: Mesh) -> str:
    """For instance "8 x cpu (data 4, group 2)"."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{mesh.size} x {jax.devices()[0].device_kind}" + (f" ({axes})" if axes else "")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {module.__name__: module.__version__ for module in (ngc_jax, jax, flax, optax)}
