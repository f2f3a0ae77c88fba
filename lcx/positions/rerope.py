"""ReRoPE and Leaky ReRoPE (Su 2023): beyond a window all keys stand equally far, or hardly farther."""

import dataclasses
import math

import jax.numpy as jnp

from lcx.attention.mask import Beyond, Within
from lcx.positions.distance_plan import PlanReach, Region, RegionPlan, plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReRoPE(RegionPlan):
    """Keys less than `window` tokens back keep their distance d, others stand at window + (d - window) / leak; without a leak,
    ReRoPE, at `window`; a leak of 1 is RoPE. Meant with a query scale (`LogN`), without which it collapses at
    large ratios."""

    window: int
    leak: float | None = None

    def validate(self):
        self.check(self.window >= 1, "window", "at least 1 token")
        self.check(self.leak is None or self.leak >= 1, "leak", "at least 1, or None for ReRoPE")

    def regions(self, pairs):
        near = Region(Within(size=self.window), plain, plain)
        if self.leak is None:
            far = lambda place: lambda index: jnp.full((*index.shape, 1), place, jnp.float32)
            return near, Region(Beyond(size=self.window), far(self.window), far(0))
        query = lambda index: (plain(index) + self.window * (self.leak - 1)) / self.leak
        return near, Region(Beyond(size=self.window), query, lambda index: plain(index) / self.leak)

    def reach(self, trained):
        """The farthest key of T tokens stands at window + (T - 1 - window) / leak."""
        if self.leak is None:
            far = None if self.window < trained else trained
        else:
            far = max(trained, math.ceil(self.window + (trained - self.window) * self.leak - 1e-9))
        return PlanReach(far, far)

    @classmethod
    def examples(cls):
        return (cls(window=4), cls(window=3, leak=4.0))
