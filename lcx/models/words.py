"""Which parameters a model has, as one number, and whether what its caches know beforehand was measured on them."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, UInt32

from lcx.cache.known import check_measured, measured_parts
from lcx.spec import Spec


def words(model: nnx.Module) -> int:
    """All parameters in bfloat16, as words, whose squares and multiples are summed modulo 2^32: the same number wherever they
    lie on devices, and whether matrices are held in float32 or, for use, in bfloat16. Those of a rope are left out, which a
    model in use has solved."""
    held = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return int(_sum({name: tree for name, tree in held.items() if name != "rope"}))


@jax.jit
def _sum(tree: Any) -> UInt32[Array, ""]:
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        word = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
        total += (word * (word + jnp.uint32(0x9E3779B0))).sum(dtype=jnp.uint32)
    return total


def check_known(spec: Spec, model: nnx.Module) -> None:
    """Raises SpecError, naming the field, if a cache of a model has tables that were measured on other parameters."""
    parts = measured_parts(spec)
    leaves = jax.tree.leaves(nnx.state(model))
    if not parts or not all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    found = words(model)
    for path, part in parts:
        check_measured(path, part, found)
