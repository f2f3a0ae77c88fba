"""Leverage scores of keys before their rotation (Compactor, 2025): directions that few tokens have.

X = (k - mean) Phi,   score = diag(X (X^T X + e I)^-1 X^T),   Phi [D, sketch] Gaussian of deviation sketch^-1/2
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcx.cache.scorers.scorer import Scored, Scorer

RIDGE = 1e-2


def standard(x: Float[Array, "B K N"], there: Bool[Array, "B G N"]) -> Float[Array, "B K N"]:
    """With mean 0 and deviation 1 over the tokens and heads of a row."""
    there = jnp.broadcast_to(there, x.shape)
    count = jnp.maximum(there.sum(axis=(1, 2), keepdims=True), 2)
    mean = jnp.where(there, x, 0).sum(axis=(1, 2), keepdims=True) / count
    spread = jnp.sqrt(jnp.where(there, jnp.square(x - mean), 0).sum(axis=(1, 2), keepdims=True) / (count - 1))
    return (x - mean) / jnp.maximum(spread, 1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leverage(Scorer):
    """sketch: directions that keys are projected to. seed: of them."""

    sketch: int = 48
    seed: int = 0

    def validate(self):
        self.check(self.sketch >= 1, "sketch", "at least 1 direction")
        self.check(0 <= self.seed < 1 << 32, "seed", "0 to 2^32 - 1")

    @property
    def raw(self):
        return True

    def directions(self, now: Scored) -> Float[Array, "K D s"]:
        K, D = now.raw.shape[1], now.raw.shape[3]
        return jax.random.normal(jax.random.key(self.seed), (K, D, self.sketch)) / jnp.sqrt(self.sketch)

    def score(self, now):
        return leverage(now.raw, now.there, self.directions(now))

    @classmethod
    def examples(cls):
        return (cls(sketch=6),)


def leverage(
    k: Float[Array, "B K N D"], there: Bool[Array, "B G N"], directions: Float[Array, "K D s"]
) -> Float[Array, "B K N"]:
    there = there[..., None]
    mean = jnp.where(there, k, 0).sum(axis=2, keepdims=True) / jnp.maximum(there.sum(axis=2, keepdims=True), 1)
    x = jnp.einsum("bknd,kds->bkns", jnp.where(there, k - mean, 0), directions, precision="highest")
    gram = jnp.einsum("bkns,bknt->bkst", x, x, precision="highest") + RIDGE * jnp.eye(x.shape[-1])
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(gram), True), jnp.swapaxes(x, 2, 3))
    return jnp.maximum(jnp.einsum("bkns,bksn->bkn", x, solved, precision="highest"), 0)
