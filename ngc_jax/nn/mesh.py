"""Devices: the mesh of a run, and how its arrays lie on it.

For: the table that says what is split over which devices. Not for: what crosses (`collectives.py`).
Mesh axes: "data" splits the batch; "fsdp" splits the batch too, and parameters and optimizer where
they are kept; "group" splits groups, so that only signals cross.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ngc_jax.core.params import ParamInfo

Array = jax.Array
Tree = Any
Axes = tuple[str | None, ...]
MESH_AXES = ("data", "fsdp", "group")  # the last varies fastest: neighbouring devices talk most
SPLIT: dict[str, tuple[str, ...]] = {  # what an axis counts -> the mesh axes that it is split over
    "window": ("data", "fsdp"),  # sequences of a batch
    "row": ("data", "fsdp", "group"),  # tokens of a batch, where each is read by itself
    "group": ("group",),  # groups
    "channel": ("group",),  # what whole groups have: channels, hidden neurons, heads
    "vocab": ("group",),  # entries of the vocabulary
    "stored": ("fsdp",),  # the longest axis of a parameter that is not split yet
}
OVER_GROUPS = ("vocab", "group", "channel")  # axes of a parameter, best first


def make_mesh(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for `config.mesh` on these devices (default: all); data=-1 is what is left."""
    devices = jax.devices() if devices is None else devices
    data = len(devices) // (config.fsdp * config.group) if config.data == -1 else config.data
    shape = (data, config.fsdp, config.group)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def single_device() -> Mesh:
    """The mesh of one device, for what needs no more."""
    return Mesh(np.reshape(jax.local_devices()[:1], (1, 1, 1)), MESH_AXES)


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The spec of an array by what its axes count. Raises ValueError where two collide."""
    wanted = [SPLIT[axis] if axis else None for axis in axes]
    used = [name for names in wanted if names for name in names]
    if len(set(used)) < len(used):
        raise ValueError(f"axes {axes}: two of them are split over the same mesh axis")
    return PartitionSpec(*wanted)


def with_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for `jax.jit` on a mesh, which `constrain` knows while it is traced."""

    def placed(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return placed


def num_shards(axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """Parts into which an axis that counts this is split on a mesh, or the current one if ours."""
    sizes = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    ours = all(name in sizes for name in MESH_AXES)
    return math.prod(sizes[name] for name in SPLIT[axis]) if ours else 1


def constrain(x: Array, *axes: str | None) -> Array:
    """x, laid out on the mesh of the moment by what its axes count, where parts are equal."""
    if num_shards("row") == 1:  # one device, or a mesh that is not one of ours
        return x
    places = [
        PartitionSpec.UNCONSTRAINED if axis and size % num_shards(axis) else place
        for size, axis, place in zip(x.shape, axes, partition_spec(*axes), strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*places))


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """How an array lies on a mesh, by what its axes count."""
    return NamedSharding(mesh, partition_spec(*axes))


replicated = sharding  # by no axes: what every device holds whole, such as scalars


def local_batch_rows(mesh: Mesh, size: int) -> list[int]:
    """Which of the `size` rows of a batch this process's devices hold, in any order of devices."""
    held = sharding(mesh, "window").addressable_devices_indices_map((size,)).values()
    return sorted({row for index in held if index for row in range(size)[index[0]]})


def put_batch(mesh: Mesh, local: Tree) -> Tree:
    """The global arrays of which `local` holds this process's rows (`local_batch_rows`)."""
    put = partial(jax.make_array_from_process_local_data, sharding(mesh, "window"))
    return jax.tree.map(put, local)


def abstract_batch(mesh: Mesh, batch: Tree) -> Tree:
    """The shapes of a batch with their shardings."""
    return jax.tree.map(lambda a: abstract(a, sharding(mesh, "window")), batch)


def abstract(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array with its sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def abstract_param(mesh: Mesh, leaf: Any, info: ParamInfo) -> jax.ShapeDtypeStruct:
    """The shape of a parameter, or of a moment of it, with its sharding: for jit and restoring."""
    return abstract(leaf, sharding(mesh, *param_axes(info, leaf.shape, mesh)))


def shardings(placed: Tree) -> Tree:
    """Where each array of a tree of shapes lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def gathered(stage: Tree, info: Callable[[], Tree]) -> Tree:
    """Parameters of a stage, split over groups only: states are gathered, not weights."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:  # and nobody need make their records
        return stage

    def used(leaf: Array, info: ParamInfo) -> Array:
        axes = param_axes(info, leaf.shape, mesh)
        return constrain(leaf, *(None if axis == "stored" else axis for axis in axes))

    return jax.tree.map(used, stage, info())


def bytes_per_device(placed: Tree) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    held = jax.tree.leaves(placed)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in held)


def param_axes(info: ParamInfo, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> Axes:
    """What the axes of a parameter count, as far as a mesh splits them; scales lie whole.

    One axis at most is split over groups; the longest other one but "stage" is "stored" apart.
    """
    axes: list[str | None] = [None] * len(shape)
    if info.kind == "scale":
        return tuple(axes)
    for counts in OVER_GROUPS:
        axis, parts = (*info.axes, counts).index(counts), num_shards(counts, mesh)
        if axis < len(axes) and parts > 1 and shape[axis] % parts == 0:
            axes[axis] = counts
            break
    left = [i for i, name in enumerate(info.axes) if name != "stage" and not axes[i]]
    left = [i for i in left if shape[i] % num_shards("stored", mesh) == 0]
    if left:
        axes[max(left, key=lambda axis: shape[axis])] = "stored"
    return tuple(axes)
