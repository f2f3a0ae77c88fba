"""SnapKV (2024): what the last queries of a prompt look at, smoothed over neighbours.

    score_j = mean over the group's heads of pool_j(mean over the window's queries of p_ij),   the window itself stays

The pool is an average over `kernel` tokens outside the window, with zeros beyond both ends.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.scorers.scorer import Scorer, mean_of_group


def pooled(x: Float[Array, "*n N"], kernel: int, by: Literal["mean", "max"] = "mean") -> Float[Array, "*n N"]:
    """Mean or maximum over a centred window of an odd number of neighbours, zeros beyond the ends."""
    dims = (1,) * (x.ndim - 1)
    start, combine = (0.0, jax.lax.add) if by == "mean" else (-jnp.inf, jax.lax.max)
    padding = (*((0, 0),) * (x.ndim - 1), (kernel // 2, kernel // 2))
    found = jax.lax.reduce_window(x, start, combine, (*dims, kernel), (1,) * x.ndim, padding)
    return found / kernel if by == "mean" else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Scorer):
    """window: the newest queries, which always stay. kernel: of the pool, an odd number. pool: an average, or the largest."""

    window: int = 64
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"

    def validate(self):
        self.check(self.window >= 1, "window", "at least 1 query")
        self.check(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "an odd number")

    @property
    def queries(self):
        return self.window

    def score(self, now):
        place = jnp.arange(now.k.shape[2])
        inside = place >= now.count[..., None] - self.window
        looked = now.looked(self.window) / jnp.minimum(now.seen, self.window)[:, None, None, None]
        looked = jnp.where(inside[:, :, None] | ~now.there[:, :, None], 0, looked)
        return jnp.where(inside, jnp.inf, mean_of_group(pooled(looked, self.kernel, self.pool)))

    @classmethod
    def examples(cls):
        return (cls(window=3, kernel=3), cls(window=2, kernel=1, pool="max"))
