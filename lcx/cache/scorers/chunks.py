"""Wrappers that score by chunks of neighbours.

`WholeChunks` is ChunkKV (2025): a chunk is worth the mean of its tokens' scores, over all key heads, so that it stays or goes
whole. `EachChunk` ranks tokens within their chunk, so that every part of a text keeps its share.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.scorers.scorer import Wrapper, scores_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunks(Wrapper):
    """size: of a chunk, in tokens that are there."""

    size: int = 20

    def validate(self):
        self.check(self.size >= 1, "size", "at least 1 token")

    def _apart(self, x: Float[Array, "B K N"], blank: float) -> Float[Array, "B K n size"]:
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % self.size)), constant_values=blank)
        return padded.reshape(*x.shape[:2], -1, self.size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WholeChunks(_Chunks):
    def score(self, now):
        scores = scores_of(self.of, now)
        top = jnp.where(now.there & jnp.isfinite(scores), scores, -jnp.inf).max(axis=2, keepdims=True)
        best = jnp.where(jnp.isfinite(top), top, 0) + 1 + jnp.arange(scores.shape[2]) / (1000 * scores.shape[2])
        finite = jnp.where(jnp.isposinf(scores), best, scores)  # what has to stay: more than the best, the newest most
        total = self._apart(jnp.where(now.there, finite, 0).sum(axis=1, keepdims=True), 0.0).sum(axis=3)
        count = self._apart(jnp.broadcast_to(now.there, scores.shape)[:, :1].astype(jnp.float32), 0.0).sum(axis=3)
        worth = jnp.where(count > 0, total / jnp.maximum(count, 1), -jnp.inf)
        order = jnp.argsort(-worth, axis=2, stable=True)
        taken = jnp.cumsum(jnp.take_along_axis(count, order, axis=2), axis=2)
        fits = (taken <= now.budget[:, None, None]) | (jnp.arange(worth.shape[2]) == 0)
        stays = jnp.take_along_axis(fits, jnp.argsort(order, axis=2), axis=2)
        worth = jnp.repeat(jnp.where(stays, worth, -jnp.inf), self.size, axis=2)[:, :, : scores.shape[2]]
        return jnp.broadcast_to(worth, scores.shape)

    @classmethod
    def examples(cls):
        from lcx.cache.scorers.key_norm import KeyNorm

        return (cls(of=KeyNorm(), size=3),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EachChunk(_Chunks):
    def score(self, now):
        scores = jnp.where(now.there, scores_of(self.of, now), -jnp.inf)
        apart = self._apart(scores, -jnp.inf)
        rank = jnp.argsort(jnp.argsort(apart, axis=3), axis=3).reshape(*scores.shape[:2], -1)[:, :, : scores.shape[2]]
        return jnp.where(jnp.isposinf(scores), jnp.inf, rank.astype(jnp.float32))

    @classmethod
    def examples(cls):
        from lcx.cache.scorers.key_norm import KeyNorm

        return (cls(of=KeyNorm(), size=4),)
