"""Dual chunk attention (An et al. 2024): positions restart in every chunk; queries look from one of three places at keys."""

import dataclasses

import jax.numpy as jnp

from lcx.attention.mask import Chunk, ChunksBack
from lcx.positions.distance_plan import PlanReach, Region, RegionPlan, plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualChunk(RegionPlan):
    """Key j stands at j mod chunk. Query i stands at i mod chunk for its own chunk, at min(i mod chunk + chunk, clip) for the
    one before, at `clip` for earlier ones. The paper: chunk 3/4 of the trained window L, clip L - 1; its code: 5/8 L, 3/4 L."""

    chunk: int
    clip: int

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(self.clip >= self.chunk, "clip", f"at least chunk = {self.chunk}")

    def regions(self, pairs):
        key = lambda index: plain(index % self.chunk)
        next_chunk = lambda index: plain(jnp.minimum(index % self.chunk + self.chunk, self.clip))
        far = lambda index: jnp.full((*index.shape, 1), self.clip, jnp.float32)
        return (
            Region(Chunk(size=self.chunk), key, key),
            Region(ChunksBack(size=self.chunk), next_chunk, key),
            Region(ChunksBack(size=self.chunk, farther=True), far, key),
        )

    def reach(self, trained):
        """No key stands farther back than `clip`, as the first ones do from the third chunk on."""
        far = None if self.clip < trained else min(trained, 2 * self.chunk)
        return PlanReach(far, far)

    @classmethod
    def examples(cls):
        return (cls(chunk=4, clip=6), cls(chunk=6, clip=9))
