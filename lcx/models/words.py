"""Which parameters a model has, as one number, and whether what its caches know beforehand was measured on them."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt32

from lcx.cache.known import check_measured, measured_parts
from lcx.spec import Spec


def words(model: nnx.Module) -> int:
    """All parameters in bfloat16, as words, each mixed with its place in its matrix (the finalizer of MurmurHash3), summed over
    a matrix, and multiplied by an odd number of its layer and name, modulo 2^32: the same number wherever they lie on devices,
    whether matrices are held in float32 or, for use, in bfloat16, and however layers are divided into a pattern and periods.
    Those of a rope are left out, which a model in use has solved."""
    held = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return int(_sum({name: tree for name, tree in held.items() if name != "rope"}))


@jax.jit
def _sum(tree: Any) -> UInt32[Array, ""]:
    total, several = jnp.uint32(0), len(tree.get("slots", ()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [str(key.key) for key in path]
        if keys[0] == "slots":  # layers that are a period apart
            of = [f"{n * several + int(keys[1])}/{'/'.join(keys[2:])}" for n in range(len(leaf))]
        else:
            leaf, of = leaf[None], ["/".join(keys)]
        odd = np.asarray([zlib.crc32(name.encode()) | 1 for name in of], np.uint32)
        total += (_of_matrices(leaf) * odd).sum(dtype=jnp.uint32)
    return total


def _of_matrices(leaf: Float[Array, "L *n"]) -> UInt32[Array, "L"]:
    word = jax.lax.bitcast_convert_type(leaf.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape[1:], jnp.uint32)
    for axis, size in enumerate(place.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis)
    x = word + place * jnp.uint32(0x9E3779B1)
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return (x ^ x >> 16).sum(axis=tuple(range(1, leaf.ndim)), dtype=jnp.uint32)


def check_known(spec: Spec, model: nnx.Module) -> None:
    """Raises SpecError, naming the field, if a cache of a model has tables that were measured on other parameters."""
    parts = measured_parts(spec)
    leaves = jax.tree.leaves(nnx.state(model))
    if not parts or not all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return
    found = words(model)
    for path, part in parts:
        check_measured(path, part, found)
