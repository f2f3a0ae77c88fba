"""Merging partial attention outputs: the associative fold that every split of the keys ends in."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Part = tuple[Float[Array, "*rows E"], Float[Array, "*rows"]]


def merge(a: Part, b: Part) -> Part:
    """`(out, lse)` of the union of two disjoint key sets. Identity is (0, -inf); value and gradient are safe there."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    nothing = (lse_a == -jnp.inf) & (lse_b == -jnp.inf)
    seen_a, seen_b = lse_a != -jnp.inf, lse_b != -jnp.inf
    finite_a, finite_b = jnp.where(seen_a, lse_a, 0), jnp.where(seen_b, lse_b, 0)
    peak = jnp.maximum(jnp.where(seen_a, finite_a, finite_b), jnp.where(seen_b, finite_b, finite_a))
    weight_a = jnp.where(seen_a, jnp.exp(jnp.where(seen_a, finite_a - peak, 0)), 0)
    weight_b = jnp.where(seen_b, jnp.exp(jnp.where(seen_b, finite_b - peak, 0)), 0)
    total = jnp.where(nothing, 1, weight_a + weight_b)
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / total[..., None]
    return out, jnp.where(nothing, -jnp.inf, peak + jnp.log(total))


def with_sinks(out: Float[Array, "B T H E"], lse: Float[Array, "B T H"], sinks: Float[Array, "H"]) -> Float[Array, "B T H E"]:
    """`merge` with the part (0, sink_h): one more logit a head in the softmax, which brings no value (gpt-oss, 2025).

    For after the last fold, whose `lse` is without sinks. Rows that see nothing give 0, and no gradient.
    """
    sees = lse != -jnp.inf
    return out * jnp.where(sees, jax.nn.sigmoid(jnp.where(sees, lse, 0) - sinks), 0)[..., None]
