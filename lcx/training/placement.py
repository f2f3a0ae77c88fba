"""Where arrays live on the mesh: parameters by their logical axes, batches by rows and sequence."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lcx.batch import Batch
from lcx.parallel.rules import Rules
from lcx.spec import SpecError


def parameter_shardings(state: nnx.State, rules: Rules, mesh: Mesh | AbstractMesh) -> dict:
    """The sharding of every parameter, as a pure dict. Raises SpecError for one without axes or that does not divide."""

    def place(path, leaf):
        name, axes = "/".join(map(str, path)), leaf.get_metadata().get("axes")
        if axes is None or len(axes) != leaf.ndim:
            raise SpecError(
                f"model: parameter {name} of shape {leaf.shape} has axes {axes}; each dimension needs a name or None"
            )
        sharding = NamedSharding(mesh, rules.partition(axes))
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            sizes = {axis: mesh.shape[axis] for axis in mesh.axis_names if mesh.shape[axis] > 1}
            raise SpecError(
                f"model: parameter {name} of shape {leaf.shape}, axes {axes}, does not divide over mesh {sizes}"
            ) from None
        return leaf.replace(sharding)

    return nnx.to_pure_dict(nnx.map_state(place, state))


def batch_shardings(batch: Batch, rules: Rules, mesh: Mesh | AbstractMesh) -> Batch:
    """The sharding of every array of a batch: rows over `batch`; the second axis, where it is the sequence, over `sequence`."""
    length = batch.shape[1]

    def place(leaf):
        if leaf.ndim == 0:
            raise ValueError("batch: every array needs a leading axis of rows; found a scalar")
        sequence = ("sequence",) if leaf.ndim > 1 and leaf.shape[1] == length else (None,) * (leaf.ndim > 1)
        logical = ("batch", *sequence, *(None,) * (leaf.ndim - 2))
        return NamedSharding(mesh, rules.partition(logical))

    return jax.tree.map(place, batch)


def place_batch(batch: Batch, rules: Rules, mesh: Mesh, *, hosts: int = 1) -> Batch:
    """The global batch on the mesh, from the rows of this process: one of `hosts` equal groups of rows."""

    def put(leaf, sharding):
        leaf = np.asarray(leaf)
        shape = (leaf.shape[0] * hosts, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(put, batch, batch_shardings(batch, rules, mesh))


def host_rows(batch_size: int, rules: Rules, mesh: Mesh) -> tuple[int, int]:
    """(host, hosts): which of how many equal groups of rows this process feeds. Processes along the sequence share a group.

    Raises SpecError if the rows do not divide over the devices, or a process's rows are not one run.
    """
    partition = rules.partition(("batch",))
    try:
        held = NamedSharding(mesh, partition).addressable_devices_indices_map((batch_size,))
    except ValueError:
        raise SpecError(f"data: batch_size {batch_size} does not divide over {partition} of mesh {dict(mesh.shape)}") from None
    rows = sorted({row for (part,) in held.values() for row in range(batch_size)[part]})
    if rows[-1] - rows[0] + 1 != len(rows) or batch_size % len(rows) or rows[0] % len(rows):
        raise SpecError(f"mesh: this process holds rows {rows} of {batch_size}: expected one run; order the devices by process")
    return rows[0] // len(rows), batch_size // len(rows)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding that keeps a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())
