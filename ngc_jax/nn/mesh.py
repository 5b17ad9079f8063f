"""Devices: the mesh of a run, and how its arrays lie on it.

For: the one table that says what is split over which devices, and the functions that put arrays
where it says. A mesh has three axes, of any of which there may be one: "data" splits the batch;
"fsdp" splits the batch too, and parameters and optimizer where they are kept (gathered where they
are used); "group" splits groups, and with them neurons, states, heads and hidden neurons, so that
work inside a group stays on its device and only signals cross. Not for: what is computed, or what
crosses in the end (`collectives.py`).

Models say what an axis of an array counts; no model knows which devices there are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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
    return jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.local_devices()[:1]
    )


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The spec of an array by what its axes count. Raises ValueError where two collide."""
    wanted = [SPLIT[axis] if axis else None for axis in axes]
    used = [name for names in wanted if names for name in names]
    if len(set(used)) < len(used):
        raise ValueError(
            f"axes {axes}: two of them are split over the same mesh axis ({', '.join(used)})"
        )
    return PartitionSpec(*wanted)


def with_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for `jax.jit` on a mesh, which `constrain` knows while it is traced."""

    def placed(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return placed


def num_shards(axis: str) -> int:
    """Parts into which an axis that counts this is split on the current mesh; 1 without one."""
    return _num_shards(_current(), axis)


def constrain(x: Array, *axes: str | None) -> Array:
    """x, laid out on the mesh of the moment by what its axes count; as it is where there is none.

    An axis whose parts would not be equal (one sequence, say) is left to the compiler.
    """
    if math.prod(_current().values()) <= 1:
        return x
    fits = [
        axis is None or size % num_shards(axis) == 0
        for size, axis in zip(x.shape, axes, strict=True)
    ]
    places = [
        place if fit else PartitionSpec.UNCONSTRAINED
        for place, fit in zip(partition_spec(*axes), fits, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*places))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole, such as scalars."""
    return NamedSharding(mesh, partition_spec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis is split."""
    return NamedSharding(mesh, partition_spec("window"))


def local_batch_rows(mesh: Mesh, size: int) -> list[int]:
    """Which of the `size` rows of a batch this process's devices hold, in any order of devices."""
    held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return sorted({row for index in held if index for row in range(size)[index[0]]})


def put_batch(mesh: Mesh, local: Tree) -> Tree:
    """The global arrays of which `local` holds this process's rows (`local_batch_rows`)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), local)


def abstract_batch(mesh: Mesh, batch: Tree) -> Tree:
    """The shapes of a batch with their shardings."""
    return jax.tree.map(lambda a: abstract(a, batch_sharding(mesh)), batch)


def abstract(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The shape of an array with its sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_param(mesh: Mesh, leaf: Any, info: ParamInfo) -> jax.ShapeDtypeStruct:
    """The shape of a parameter, or of a moment of it, with its sharding: for jit and restoring."""
    spec = partition_spec(*param_axes(info, leaf.shape, mesh))
    return abstract(leaf, NamedSharding(mesh, spec))


def shardings(placed: Tree) -> Tree:
    """Where each array of a tree of shapes lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def gathered(stage: Tree, info: Callable[[], Tree]) -> Tree:
    """Parameters of one stage as they are used: split over groups, but not as they are stored.

    States are gathered, before weights are made of them; else the weights would be. `info()`, their
    records, is asked for on a mesh of several devices only.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return stage

    def used(leaf: Array, info: ParamInfo) -> Array:
        axes = param_axes(info, leaf.shape, mesh)
        return constrain(leaf, *(None if axis == "stored" else axis for axis in axes))

    return jax.tree.map(used, stage, info())


def bytes_per_device(placed: Tree) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    parts = [(a.sharding.shard_shape(a.shape), a.dtype) for a in jax.tree.leaves(placed)]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def param_axes(info: ParamInfo, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> Axes:
    """What the axes of a parameter count, as far as a mesh splits them; scales lie whole.

    One axis at most is split over groups, and the longest other one is "stored" apart; never
    "stage", along which a loop walks.
    """
    axes: list[str | None] = [None] * len(shape)
    if info.kind == "scale":
        return tuple(axes)
    wanted = [(info.axes.index(name), name) for name in OVER_GROUPS if name in info.axes]
    for axis, counts in wanted:
        parts = _num_shards(mesh.shape, counts)
        if parts > 1 and shape[axis] % parts == 0:
            axes[axis] = counts
            break
    stored = _num_shards(mesh.shape, "stored")
    left = [i for i, name in enumerate(info.axes) if name != "stage" and not axes[i]]
    left = [i for i in left if shape[i] % stored == 0]
    if left:
        axes[max(left, key=lambda axis: shape[axis])] = "stored"
    return tuple(axes)


def _current() -> Mapping[str, int]:
    """The axes of the mesh of the moment and their sizes; none where it is not one of ours."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return sizes if all(name in sizes for name in MESH_AXES) else {}


def _num_shards(sizes: Any, axis: str) -> int:
    return math.prod(sizes.get(name, 1) for name in SPLIT[axis])
