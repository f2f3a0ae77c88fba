"""TOVA (2024): what the last query looks at, all heads together; its own token stays.

score_j = mean over heads of p_j
"""

import dataclasses

import jax.numpy as jnp

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(Scorer):
    @property
    def queries(self):
        return 1

    def score(self, now):
        looked = now.attention(1).mean(axis=(1, 2, 3))[:, None]
        newest = jnp.arange(now.k.shape[2]) == now.count[..., None] - 1
        return jnp.where(newest, jnp.inf, jnp.broadcast_to(looked, now.k.shape[:3]))

    @classmethod
    def examples(cls):
        return (cls(),)
