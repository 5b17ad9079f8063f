"""Devices: the mesh of a run, and how its arrays lie on it.

For: the one place that says what is split over which devices. Today that is the batch, over "data"; parameters are
whole on each device. Not for: what is computed.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(config: Any) -> Mesh:
    """The mesh for `config.mesh`; -1 devices are all there are."""
    devices = jax.device_count() if config.data == -1 else config.data
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def whole(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it: the state, and scalars."""
    return NamedSharding(mesh, PartitionSpec())


def rows(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the data devices: batches."""
    return NamedSharding(mesh, PartitionSpec("data"))


def put_rows(mesh: Mesh, local: np.ndarray) -> jax.Array:
    """The global array whose rows on this process are `local`."""
    return jax.make_array_from_process_local_data(rows(mesh), local)
