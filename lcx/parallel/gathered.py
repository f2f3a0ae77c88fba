"""Weights that are shared out over the devices that share out the tokens: gathered to be used, their gradients scattered.

One mesh axis at a time, and rows that are scattered padded to whole `LANES`: else the TPU compiler makes all-reduces of whole
matrices, which send twice the bytes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lcx.parallel.rules import Rules, ambient_mesh
from pallas_kernels.target import platform

LANES = 1024  # of a row that a TPU scatters

Spread = tuple[tuple[str, ...], ...]  # of an array, the mesh axes that share out each dimension


def logical_axes(variable: Any, rank: int) -> tuple[str | None, ...]:
    """The logical axes of an array of `rank` axes of a module; None along axes without a name."""
    named = variable.get_metadata().get("axes") if isinstance(variable, nnx.Variable) else None
    return (None,) * rank if named is None else tuple(named[len(named) - rank :])  # one of a stack has one less


def token_axes(rules: Rules) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that share out rows, and those that share out the tokens of a row: of several devices, and not mapped over
    already."""
    mesh = ambient_mesh()
    some = lambda axes: tuple(a for a in axes if mesh is not None and mesh.shape[a] > 1 and a not in mesh.manual_axes)
    return some(rules.batch), some(rules.sequence)


def axes_size(axes: tuple[str, ...]) -> int:
    """Devices along mesh axes."""
    mesh = ambient_mesh()
    return math.prod(1 if mesh is None else mesh.shape[axis] for axis in axes)


def spread_of(axes: tuple[str | None, ...], rules: Rules, over: tuple[str, ...]) -> Spread:
    """Of an array with these logical axes, the mesh axes among `over` that share it out."""
    chosen = (() if axis is None else getattr(rules, axis) for axis in axes)
    return tuple(tuple(axis for axis in mine if axis in over) for mine in chosen)


def on_shares(local: Callable[..., Any], inputs: Any, outputs: Any, over: tuple[str, ...]) -> Callable[..., Any]:
    """`local` on what a device holds of the inputs; other mesh axes than `over` are left to the compiler."""
    if not over:
        return local
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, axis_names={*over}, check_vma=False)


def partition(spread: Spread) -> PartitionSpec:
    return PartitionSpec(*(axes or None for axes in spread))


def gather(share: Array, spread: Spread) -> Array:
    """The whole array, inside `shard_map`."""
    for dim, axes in enumerate(spread):
        for axis in reversed(axes):
            share = jax.lax.all_gather(share, axis, axis=dim, tiled=True)
    return share


def scatter(whole: Array, spread: Spread, over: tuple[str, ...] = ()) -> Array:
    """This device's share of the sum over devices, inside `shard_map`: over the axes of the spread and those of `over`.

    On a CPU bfloat16 is summed in float32: XLA does so anyway, but aborts where other mesh axes are left to the compiler.
    """
    if whole.dtype == jnp.bfloat16 and platform() == "cpu":
        return scatter(whole.astype(jnp.float32), spread, over).astype(whole.dtype)
    width = whole.shape[-1] if any(spread[:-1]) and not spread[-1] else 0
    if width > LANES:
        whole = jnp.pad(whole, ((0, 0),) * (whole.ndim - 1) + ((0, -width % LANES),))
    for dim, axes in enumerate(spread):
        for axis in axes:
            whole = jax.lax.psum_scatter(whole, axis, scatter_dimension=dim, tiled=True)
    rest = tuple(axis for axis in over if not any(axis in axes for axes in spread))
    whole = whole[..., :width] if width else whole
    return jax.lax.psum(whole, rest) if rest else whole
