"""What a model costs: parameters stored, weights generated, FLOPs, memory; and what devices can do.

For: numbers that are counted from shapes and programs. Not for: measured speed.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ngc_jax.nn.model import LanguageModel

Tree = Any
PEAKS = {  # FLOPs a second of one device in bfloat16, without sparsity, by the vendors' data sheets
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


class Parameters(NamedTuple):
    """Stored parameters: all, in matrices (neuron states, or dense weights), in both embeddings."""

    total: int
    matrices: int
    embeddings: int


def parameters(params: Tree, info: Tree) -> Parameters:
    """Count a tree of arrays or shapes by its records (`model.param_info()`)."""
    sizes: dict[str, int] = defaultdict(int)
    for leaf, one in zip(jax.tree.leaves(params), jax.tree.leaves(info), strict=True):
        sizes[one.kind] += math.prod(leaf.shape)
    sizes.pop("wiring", None)
    return Parameters(sum(sizes.values()), sizes["state"] + sizes["matrix"], sizes["embedding"])


def generated_weights(model: LanguageModel) -> int:
    """Weights generated in one forward pass."""
    return sum(sum(synapses.values()) for synapses in model.generated().values())


def peak_memory(compiled: Any) -> int:
    """Bytes on a device of what a compiled program is given, returns and needs on the way."""
    memory = compiled.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return int(peak - memory.alias_size_in_bytes)


def forward_flops(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of matrix products (2 a multiply-add) in a call, as traced; `args` may be abstract."""
    return _flops(jax.make_jaxpr(function)(*args))


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [_flops(j) for value in equation.params.values() for j in _jaxprs(value)]
        if inner:
            times = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += times * (max(inner) if equation.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(value: Any) -> list[Any]:
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return [value]
    return [j for item in value for j in _jaxprs(item)] if isinstance(value, list | tuple) else []


def peak(dtype: str, kind: str = "") -> float | None:
    """Peak FLOPs a second of a device of this kind (default: here) in bfloat16; None: not known."""
    kind = kind or jax.devices()[0].device_kind
    found = (peak for name, peak in PEAKS.items() if kind.startswith(name))
    return next(found, None) if dtype == "bfloat16" else None
