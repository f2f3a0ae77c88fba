"""CurDKV (2025): tokens of large keys and values among their neighbours, as approximate leverage scores.

score = |k|^2 |v|^2, each as a share of its sum over a window of neighbours
"""

import dataclasses

import jax.numpy as jnp

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurDKV(Scorer):
    """window: tokens. sinks: first tokens of a document, which stay."""

    window: int = 16
    sinks: int = 4

    def validate(self):
        self.check(self.window >= 1, "window", "at least 1 token")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")

    def score(self, now):
        N = now.k.shape[2]

        def share(x):
            squares = jnp.where(now.there, jnp.square(x).sum(axis=-1), 0)
            apart = jnp.pad(squares, ((0, 0), (0, 0), (0, -N % self.window))).reshape(*squares.shape[:2], -1, self.window)
            sums = jnp.maximum(apart.sum(axis=-1, keepdims=True), 1e-30)
            return (apart / sums).reshape(*squares.shape[:2], -1)[:, :, :N]

        return jnp.where(now.info.index < self.sinks, jnp.inf, share(now.k) * share(now.v))

    @classmethod
    def examples(cls):
        return (cls(window=4, sinks=1),)
