"""KeyDiff (2025): keys that differ from the others are worth keeping.

    score = - cos(k, mean of the normalised keys)

The paper scores again after every block: a prefill in chunks does.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.scorers.scorer import Scorer


def unit(x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDifference(Scorer):
    def score(self, now):
        keys = jnp.where(now.there[..., None], unit(now.k), 0)
        return -jnp.einsum("bknd,bkd->bkn", keys, unit(keys.sum(axis=2)), precision="highest")

    @classmethod
    def examples(cls):
        return (cls(),)
