"""Quest (2024): of a page the largest and smallest number of each channel bound what a query can find in it.

    score = sum_c max(q_c most_c, q_c least_c)

Theirs: pages of 16, the first two layers whole, each query head for itself; here the heads of a key head read the same pages.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.selectors.pages import Pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quest(Pages):
    def summarise(self, k, there):
        k = k.astype(jnp.float32)
        most = jnp.where(there[..., None], k, -jnp.inf).max(axis=3)
        least = jnp.where(there[..., None], k, jnp.inf).min(axis=3)
        some = there.any(axis=3)[..., None]
        return _outward(jnp.where(some, most, 0), jnp.inf), _outward(jnp.where(some, least, 0), -jnp.inf)

    def score(self, q, summaries):
        most, least = (x.astype(jnp.float32) for x in summaries)
        up, down = jnp.maximum(q, 0), jnp.minimum(q, 0)
        product = lambda q, x: jnp.einsum("bkgd,bkpd->bkgp", q, x, precision="highest")
        return product(up, most) + product(down, least)

    @classmethod
    def examples(cls):
        return (cls(page=32, budget=64, dense_layers=0), cls(page=4, budget=8, group="sum"))


def _outward(x: Float[Array, "*n"], limit: float) -> Float[Array, "*n"]:
    """In bfloat16, no nearer to zero than a bound may be: rounded towards `limit`."""
    rounded = x.astype(jnp.bfloat16)
    short = (rounded.astype(jnp.float32) < x) if limit > 0 else (rounded.astype(jnp.float32) > x)
    return jnp.where(short, jnp.nextafter(rounded, jnp.asarray(limit, jnp.bfloat16)), rounded)
