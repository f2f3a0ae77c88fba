"""The largest scores of each row, by bisection: a sort of every token takes a TPU far longer than these passes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from lcx.cache.picking import places


def top(
    scores: Float[Array, "B G N"], budget: Int[Array, "B G"], count: int
) -> tuple[Int[Array, "B G C"], Bool[Array, "B G C"]]:
    """(index, there) of the `budget` largest scores of each row, at most `count`, oldest first. -inf is not taken; of equals
    the older is."""
    taken = largest(scores, jnp.minimum(budget, count))
    there = jnp.arange(count) < taken.sum(axis=2, keepdims=True)
    return jnp.where(there, places(taken, count), 0), there


def largest(scores: Float[Array, "*n N"], budget: Int[Array, "*n"]) -> Bool[Array, "*n N"]:
    """Which are the `budget` largest of each row, -inf left out, of equals the first."""
    key, budget = _ordered(scores), budget[..., None]

    def lower(n, edge):
        higher = edge | jnp.uint32(1) << (31 - n).astype(jnp.uint32)
        return jnp.where((key >= higher).sum(axis=-1, keepdims=True) >= budget, higher, edge)

    edge = jax.lax.fori_loop(0, 32, lower, jnp.zeros(budget.shape, jnp.uint32))  # the least key that is taken
    equal = key == edge
    room = budget - (key > edge).sum(axis=-1, keepdims=True)
    taken = (key > edge) | (equal & (jnp.cumsum(equal, axis=-1) <= room))
    return taken & (key > _ordered(jnp.float32(-jnp.inf)))


def _ordered(x: Float[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Numbers as integers in the same order; what is no number is the least."""
    x = jnp.where(jnp.isnan(x), -jnp.inf, jnp.where(x == 0, 0, x.astype(jnp.float32)))  # -0 is 0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
