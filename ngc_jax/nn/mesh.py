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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from ngc_jax.core.rules import RULES
from ngc_jax.training.optimizer import kind

Array = jax.Array
Tree = Any
Axes = tuple[str | None, ...]

MESH_AXES = ("data", "fsdp", "group")  # the last varies fastest: neighbouring devices talk most
SPLIT: dict[str, tuple[str, ...]] = {  # what an axis counts -> the mesh axes that it is split over
    "window": ("data", "fsdp"),  # sequences of a batch
    "row": ("data", "fsdp", "group"),  # tokens of a batch, where each is read by itself
    # groups, and what is made of whole ones: channels of the stream, hidden neurons, heads
    "group": ("group",),
    "vocab": ("group",),  # entries of the vocabulary
    "stored": ("fsdp",),  # the longest axis of a parameter that is not split yet
}
_FAN = 2  # a stage's states are [stage, fan, ...]
# on an axis that a loop walks along: it stays whole
_STACKS = {"prelude", "stages", "coda", "senders", "cells"}


def make_mesh(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for `config.mesh` on these devices, by default all there are; -1 along "data" is
    what is left.
    """
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
    """Where an array lies whose axes count this (None: whole). Raises ValueError where two want the
    same devices.
    """
    wanted = [SPLIT[axis] if axis else None for axis in axes]
    used = [name for names in wanted if names for name in names]
    if len(set(used)) < len(used):
        raise ValueError(
            f"axes {axes}: two of them are split over the same mesh axis ({', '.join(used)})"
        )
    return PartitionSpec(*wanted)


def with_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as it is computed on a mesh: for `jax.jit`, so that `constrain` knows the mesh
    while it is traced.
    """

    def placed(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return placed


def num_shards(axis: str) -> int:
    """Into how many parts an axis that counts this is split on the mesh of the moment; 1 where
    there is none.
    """
    return _num_shards(jax.sharding.get_abstract_mesh().shape, axis)


def constrain(x: Array, *axes: str | None) -> Array:
    """x, laid out on the mesh of the moment by what its axes count; as it is where there is none.

    An axis whose parts would not be equal (one sequence, say) is left to the compiler.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
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
    """Every device holds all of it: scalars."""
    return NamedSharding(mesh, partition_spec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split: batches."""
    return NamedSharding(mesh, partition_spec("window"))


def local_batch_rows(mesh: Mesh, size: int) -> list[int]:
    """Which of the `size` rows of a batch this process's devices hold, however the mesh has ordered
    the devices.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return sorted({row for index in held if index for row in range(size)[index[0]]})


def put_batch(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """The global array of which `local` are the rows that this process holds, in order
    (`local_batch_rows`).
    """
    return jax.make_array_from_process_local_data(batch_sharding(mesh), local)


def abstract_shardings(mesh: Mesh, tree: Tree) -> Tree:
    """The shapes of a run's state, or of its parameters alone, with where each array lies: for jit
    and for restoring.

    A parameter's moments in the optimizer lie where it does.
    """

    def where(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        lies = NamedSharding(mesh, partition_spec(*axes_of(path, leaf.shape, mesh)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies)

    return jax.tree_util.tree_map_with_path(where, tree)


def shardings(placed: Tree) -> Tree:
    """Where each array of `abstract_shardings` lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, placed)


def gathered(stage: Tree) -> Tree:
    """Parameters of one stage as they are used: what lies apart only to be kept is brought
    together, groups are not.

    Said of states, before weights are made of them: else it is the weights that would be brought
    together.
    """

    def used(path: tuple[Any, ...], leaf: Array) -> Array:
        _, *axes = axes_of(path, (1, *leaf.shape), jax.sharding.get_abstract_mesh())
        return constrain(leaf, *(None if axis == "stored" else axis for axis in axes))

    return jax.tree_util.tree_map_with_path(used, stage)


def bytes_per_device(placed: Tree) -> int:
    """Bytes that one device holds of `abstract_shardings`."""
    parts = [
        (leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(placed)
    ]
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts)


def axes_of(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> Axes:
    """What the axes of an array of the state count, by its tree path, as far as a mesh splits them.

    Scales (a number a channel) and scalars are whole everywhere.
    """
    axes: list[str | None] = [None] * len(shape)
    names = [str(getattr(key, "key", key)) for key in path]
    if kind(path) == "scale":
        return tuple(axes)
    for axis, counts in _split_over_group(names):
        parts = _num_shards(mesh.shape, counts)
        if parts > 1 and shape[axis] % parts == 0:
            axes[axis] = counts
            break
    first = 1 if _STACKS & set(names) else 0
    left = [axis for axis in range(first, len(shape)) if not axes[axis]]
    left = [axis for axis in left if shape[axis] % _num_shards(mesh.shape, "stored") == 0]
    if left:
        axes[max(left, key=lambda axis: shape[axis])] = "stored"
    return tuple(axes)


def _split_over_group(names: list[str]) -> list[tuple[int, str]]:
    """The axes of a parameter that may be split over "group", and what they count, best first."""
    last = names[-1]
    if last == "embed":  # [V, D]: looking up a token's channels crosses nothing
        return [(1, "group")]
    if last == "unembed":  # [D, V]: see `nn/layers.py`
        return [(1, "vocab"), (0, "group")]
    # [stage, fan, 1, n_out, n_in]: by heads or hidden neurons, whichever side has them
    if "dense_block" in names:
        return [(_FAN + 1 if {"query_key_value", "gate_up"} & set(names) else _FAN + 2, "group")]
    if {"encoder", "encoder_v", "decoder"} & set(names):  # of BDH: heads first
        return [(0, "group")]
    part = next((name for name in names if name.partition("_")[2] in RULES), "")
    if last in ("pre", "post", "state") or (
        last == "map" and RULES[part.partition("_")[2]].grouped
    ):
        return [(_FAN, "group")]
    return []  # what all neurons share


def _num_shards(sizes: Any, axis: str) -> int:
    return math.prod(sizes.get(name, 1) for name in SPLIT[axis])


def check(config: Any, need: Callable[[bool, str, str], None]) -> None:
    """The part of `config.validate` that is about `config.mesh`; need(holds, field, what it must
    be) refuses.
    """
    mesh, m, t, devices = config.mesh, config.model, config.train, jax.device_count()
    here = jax.local_device_count()
    common = ", ".join(str(n) for n in range(1, here + 1) if here % n == 0 and m.heads % n == 0)
    of_heads = (
        f"a divisor of model.heads={m.heads} and of the {here} devices of a process: {common}"
    )
    need(
        mesh.group >= 1 and m.heads % mesh.group == 0 and here % mesh.group == 0,
        "mesh.group",
        of_heads,
    )
    parts = devices // mesh.group
    divisors = ", ".join(str(n) for n in range(1, parts + 1) if parts % n == 0)
    of_parts = f"a divisor of the {devices} devices here / mesh.group={mesh.group}: {divisors}"
    need(mesh.fsdp >= 1 and parts % mesh.fsdp == 0, "mesh.fsdp", of_parts)
    rest = parts // mesh.fsdp
    left = f"the {devices} devices here / (mesh.fsdp={mesh.fsdp} x mesh.group={mesh.group}), {rest}, or -1"
    need(mesh.data in (-1, rest), "mesh.data", left)
    unit = t.accumulation * parts
    near = -(-t.batch_size // unit) * unit
    multiple = (
        f"a multiple of train.accumulation={t.accumulation} x {parts} parts (mesh.data x mesh.fsdp)"
    )
    need(t.batch_size % unit == 0, "train.batch_size", f"{multiple}, for instance {near}")
    near = -(-config.eval.batch_size // parts) * parts
    of_parts = f"a multiple of {parts} parts (mesh.data x mesh.fsdp), for instance {near}"
    need(config.eval.batch_size % parts == 0, "eval.batch_size", of_parts)
