"""Key norm (Devoto et al., 2024): keys of small norm receive the most attention.

score = - |k|
"""

import dataclasses

import jax.numpy as jnp

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyNorm(Scorer):
    def score(self, now):
        return -jnp.linalg.norm(now.k, axis=-1)

    @classmethod
    def examples(cls):
        return (cls(),)
