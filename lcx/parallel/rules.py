"""Rules: which mesh axes shard each logical axis of parameters and activations.

A logical axis that is absent from the rules, or None, is replicated. One mesh axis can shard only one axis of an array.
"""

import dataclasses
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array

from lcx.parallel.mesh import AXES
from lcx.spec import Spec, SpecError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules(Spec):
    """batch, sequence: activations. width, heads, kv_heads, hidden, vocab, layers: parameters (and heads of activations).
    slots: of caches."""

    batch: tuple[str, ...] = ("data", "fsdp")
    sequence: tuple[str, ...] = ("context",)
    width: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    hidden: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()

    def validate(self):
        for field in dataclasses.fields(self):
            axes = getattr(self, field.name)
            self.check(set(axes) <= set(AXES) and len(set(axes)) == len(axes), field.name, f"distinct axes of {AXES}")
        self.check(not set(self.batch) & set(self.sequence), "sequence", f"axes apart from those of batch, {self.batch}")
        taken = {*self.batch, *self.sequence, *self.heads, *self.kv_heads}
        self.check(not taken & set(self.slots), "slots", f"axes apart from those of rows, sequences and heads, {sorted(taken)}")

    def partition(self, logical: tuple[str | None, ...], *, apart: Collection[str] = ()) -> PartitionSpec:
        """The partition of an array with these logical axes over mesh axes, those in `apart` left out.

        Raises SpecError on an unknown name or a collision.
        """
        names = {field.name for field in dataclasses.fields(self)}
        if unknown := [axis for axis in logical if axis is not None and axis not in names]:
            raise SpecError(f"rules: no logical axis {unknown[0]!r}; there are {', '.join(sorted(names))}")
        chosen = [() if axis is None else getattr(self, axis) for axis in logical]
        flat = [axis for axes in chosen for axis in axes]
        if len(set(flat)) != len(flat):
            raise SpecError(f"rules: axes {logical} map to {chosen}: a mesh axis would shard two axes of one array")
        kept = (tuple(axis for axis in axes if axis not in apart) for axes in chosen)
        return PartitionSpec(*(axes or None for axes in kept))

    @classmethod
    def examples(cls):
        return (cls(), cls(width=("fsdp", "context")))


def ambient_mesh() -> AbstractMesh | None:
    """The mesh set by `jax.set_mesh` if it has more than one device, else None: the unsharded program."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def shard(x: Array, rules: Rules, *logical: str | None) -> Array:
    """Constrains the sharding of an activation under the ambient mesh; without one, returns it unchanged.

    Inside `shard_map` the axes that it maps over are left out: there an array is what one device holds of it.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, rules.partition(logical, apart=mesh.manual_axes))


def shared_rows(tree: Any, rules: Rules) -> Any:
    """Arrays [B, ...] with their rows shared out under the ambient mesh, whatever becomes of their other axes."""
    mesh = ambient_mesh()
    if mesh is None:
        return tree
    (rows,) = rules.partition(("batch",))
    place = lambda x: PartitionSpec(rows, *[PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, place(x)), tree)


def whole_rows(y: Array, *, rules: Rules, heads: int) -> Array:
    """Of [B,T,H,...] in float32: all tokens of a row of a share of the heads on each device, over the axes of the sequence too
    where heads divide."""
    rules = dataclasses.replace(rules, heads=row_axes(rules, heads)[1])
    return shard(y.astype(jnp.float32), rules, "batch", None, "heads", *[None] * (y.ndim - 3))


def row_axes(rules: Rules, heads: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that share out the rows and the heads of `whole_rows`."""
    mesh, spread = ambient_mesh(), (*rules.heads, *rules.sequence)
    divides = mesh is not None and heads % math.prod(mesh.shape[axis] for axis in spread) == 0
    return rules.batch, spread if divides else rules.heads
