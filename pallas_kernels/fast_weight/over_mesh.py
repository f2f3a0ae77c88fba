"""A group of chunks on a mesh: every device computes its own rows and heads, which need nothing of each other."""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.fast_weight.tpu import Given

Axes = tuple[tuple[str, ...], tuple[str, ...]]  # of a mesh: over rows, over heads


def over_mesh(run: Callable, axes: Axes) -> Callable:
    """A kernel's `group`, of arrays that the axes of the mesh in use share out; a number of rows or heads that they do not
    divide is whole on all of them."""

    def shared(given: Given, flags: Array):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return run(given, flags)
        rows, heads = given.pieces[0].shape[1:3]
        over = [_dividing(mesh, some, count) for some, count in zip(axes, (rows, heads), strict=True)]
        of = lambda tree, *parts: jax.tree.map(lambda x: PartitionSpec(*parts), tree)
        B, H = over
        parts = Given(of(given.state, B, H), of(given.first, H), of(given.fixed, H), of(given.pieces, None, B, H))
        found = PartitionSpec(None, B, H)
        outputs = (found, found, of(given.state, B, H))
        return jax.shard_map(run, in_specs=(parts, PartitionSpec(None, None, B)), out_specs=outputs, check_vma=False)(
            given, flags
        )

    return shared


def _dividing(mesh, axes: tuple[str, ...], count: int) -> tuple[str, ...] | None:
    free = tuple(axis for axis in axes if axis in mesh.shape and axis not in mesh.manual_axes)
    return free if free and count % math.prod(mesh.shape[axis] for axis in free) == 0 else None
