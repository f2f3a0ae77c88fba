"""Token embedding on a mesh: rows of the table go to the tokens; the table and its gradient stay where they are.

A device looks up its own share of the width, and of the vocabulary, for the tokens of all devices that hold other shares, and
they exchange what they found for whole rows of their own tokens: tokens x width numbers are sent instead of vocabulary x
width, and the gradient of a share is made in place.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.parallel.rules import Rules, ambient_mesh


def lookup(
    table: Float[Array, "V M"], tokens: Int[Array, "B T"], *, scale: float, rules: Rules, compute: str
) -> Float[Array, "B T M"]:
    """`scale` times rows of the table, in the dtype `compute`; negative tokens give zeros."""
    mesh = ambient_mesh()
    if mesh is None:
        return _rows(table, tokens, scale, compute)
    width = [axis for axis in rules.width if mesh.shape[axis] > 1]
    shared = {axis: 0 if axis in rules.batch else 1 for axis in width if axis in (*rules.batch, *rules.sequence)}

    def local(table, tokens):
        for axis, dim in shared.items():
            tokens = jax.lax.all_gather(tokens, axis, axis=dim, tiled=True)
        if rules.vocab:
            tokens = tokens - jax.lax.axis_index(rules.vocab) * table.shape[0]
        rows = jax.lax.psum(_rows(table, tokens, scale, compute), rules.vocab)
        for axis in reversed(width):  # the last axis of the width is the innermost, of the tokens the outermost
            if axis in shared:
                rows = jax.lax.all_to_all(rows, axis, split_axis=shared[axis], concat_axis=2, tiled=True)
            else:
                rows = jax.lax.all_gather(rows, axis, axis=2, tiled=True)
        return rows

    ids, rows = rules.partition(("batch", "sequence")), rules.partition(("batch", "sequence", None))
    parts = rules.partition(("vocab", "width")), ids
    return jax.shard_map(local, in_specs=parts, out_specs=rows, check_vma=False)(table, tokens)


def _rows(table: Float[Array, "V M"], tokens: Int[Array, "B T"], scale: float, compute: str) -> Float[Array, "B T M"]:
    """Zeros for tokens that are not rows of the table."""
    found = (tokens >= 0) & (tokens < table.shape[0])
    rows = jnp.where(found[..., None], jnp.take(table, jnp.where(found, tokens, 0), axis=0), 0)
    return (rows * scale).astype(compute)
