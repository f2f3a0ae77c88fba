"""Folding (kvpress, 2026, after D2O, 2024): evicted tokens leave their values with those kept whose keys are most like theirs.

w = max(cos(k_e, k_t), 0) |v_e| / (|v_e| + |v_t|),   v_t <- (v_t + sum w v_e) / (1 + sum w),   keys as they were
"""

import dataclasses

import jax.numpy as jnp

from lcx.cache.kv_state import taken
from lcx.cache.picking import by_parts
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.key_difference import unit

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold(Evict):
    """heads: not `adaptive`."""

    def validate(self):
        super().validate()
        self.check(self.heads != "adaptive", "heads", "'own' or 'shared'")

    def compress(self, now, slots):
        kept = super().compress(now, slots)
        B, K, N, _ = now.v.shape
        by_all = lambda x: jnp.broadcast_to(x, (B, K, *x.shape[2:]))
        index, there = by_all(kept.index), by_all(kept.there)
        keys, values = (taken(x, index) for x in (unit(now.k), now.v))
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
        stays = jnp.zeros((B, K, N), bool).at[rows, heads, jnp.where(there, index, N)].set(True, mode="drop")
        segments = by_all(now.info.segments)
        kept_segments = taken(segments, index)[:, :, None]

        def likest(k, segments):
            alike = jnp.einsum("bknd,bkcd->bknc", k, keys, precision="highest")
            alike = jnp.where(there[:, :, None] & (segments[..., None] == kept_segments), alike, -jnp.inf)
            return alike.max(axis=3), alike.argmax(axis=3)

        best, target = by_parts(likest, unit(now.k), segments, size=128)
        size = jnp.linalg.norm(now.v, axis=-1)
        met = jnp.take_along_axis(jnp.linalg.norm(values, axis=-1), target, axis=2)
        weight = jnp.maximum(best, 0) * size / (size + met + EPSILON)
        weight = jnp.where(by_all(now.there) & ~stays, weight, 0)
        zeros = jnp.zeros(index.shape)
        sums = jnp.zeros_like(values).at[rows, heads, target].add(weight[..., None] * now.v)
        total = zeros.at[rows, heads, target].add(weight)
        return dataclasses.replace(kept, v=(values + sums) / (1 + total)[..., None])

    @classmethod
    def examples(cls):
        from lcx.cache.scorers.key_norm import KeyNorm

        return (cls(score=KeyNorm(), keep=8, every=2),)
