"""ThinK (2024): of the keys that stay the least important channels are left out: they are 0.

score_d = mean over the group's heads of mean over the newest `window` queries of q_d^2, times mean over keys of k_d^2

Channels are those of rotated keys, and one choice is made for a key head each time that the policy acts; what is 0 stays 0. As
in kvpress it takes the bytes that it took before. Tokens stay or go by the score, as with Evict.
"""

import dataclasses

import jax.numpy as jnp

from lcx.batch import PADDING
from lcx.cache.kv_state import taken
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.recency import Recency
from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThinK(Evict):
    """channels: the share that is left out, rounded down. window: newest queries. score, keep: by default all tokens stay."""

    channels: float = 0.4
    window: int = 32
    score: Scorer = Recency()
    keep: int | float = 1.0

    def validate(self):
        super().validate()
        self.check(0 <= self.channels < 1, "channels", "a share from 0 to below 1")
        self.check(self.window >= 1, "window", "at least 1 query")
        self.check(not self.score.raw, "score", "one that reads rotated keys, as channels are those of rotated keys")

    @property
    def queries(self):
        return max(self.window, self.score.queries)

    @property
    def rotated(self):
        return True

    def compress(self, now, slots):
        kept = super().compress(now, slots)
        B, K, _, D = now.k.shape
        by_all = lambda x: jnp.broadcast_to(x, (B, K, *x.shape[2:]))
        index, there = by_all(kept.index), by_all(kept.there)[..., None]
        keys = taken(now.raw, index)
        real = (now.newest_info.segments[:, -self.window :] != PADDING)[..., None, None]
        asked = jnp.where(real, jnp.square(now.newest[:, -self.window :].astype(jnp.float32)), 0).sum(axis=1)
        asked = asked.reshape(B, K, -1, D).mean(axis=2) / jnp.maximum(real.sum(axis=1), 1)
        size = jnp.where(there, jnp.square(keys), 0).sum(axis=2) / jnp.maximum(there.sum(axis=2), 1)
        rank = jnp.argsort(jnp.argsort(asked * size, axis=2, stable=True), axis=2)
        stays = rank >= int(D * self.channels)
        return dataclasses.replace(kept, k=jnp.where(stays[:, :, None], keys, 0))

    @classmethod
    def examples(cls):
        return (cls(keep=10, every=2, window=3),)
