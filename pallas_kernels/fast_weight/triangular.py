"""(I + N)^{-1} R of strictly lower triangular N, with products of matrices alone: for kernels, which have no substitution."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fast_weight.network import product


@jax.custom_vjp
def solved(lower: Float[Array, "b b"], rows: Float[Array, "b E"]) -> Float[Array, "b E"]:
    """What `lower` holds on and above its diagonal must be 0."""
    return product(_inverse(lower), rows)


def _inverse(lower: Float[Array, "b b"]) -> Float[Array, "b b"]:
    """Diagonal blocks of 1, 2, 4 ... rows are inverted from those of half the size: nothing larger than these inverses is made,
    where a power series would make powers of N."""
    size = len(lower)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, lower.shape, axis) for axis in (0, 1))
    inverse, block = (i == j).astype(lower.dtype), 0
    while 1 << block < size:
        below = (i >> block + 1 == j >> block + 1) & ((i >> block) & 1 == 1) & ((j >> block) & 1 == 0)
        inverse -= product(product(inverse, jnp.where(below, lower, 0.0)), inverse)
        block += 1
    return inverse


def _forward(lower, rows):
    inverse = _inverse(lower)
    found = product(inverse, rows)
    return found, (inverse, found)


def _backward(kept, d_found):
    inverse, found = kept
    d_rows = product(inverse.T, d_found)
    i, j = (jax.lax.broadcasted_iota(jnp.int32, inverse.shape, axis) for axis in (0, 1))
    return jnp.where(i > j, -product(d_rows, found.T), 0.0), d_rows


solved.defvjp(_forward, _backward)
