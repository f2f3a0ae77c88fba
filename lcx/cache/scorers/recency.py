"""Recency: the newest tokens stay, beside the sinks of the policy. With `sinks` 4 it is StreamingLLM (2023)."""

import dataclasses

import jax.numpy as jnp

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recency(Scorer):
    def score(self, now):
        return jnp.broadcast_to(jnp.arange(now.k.shape[2], dtype=jnp.float32), now.k.shape[:3])

    @classmethod
    def examples(cls):
        return (cls(),)
