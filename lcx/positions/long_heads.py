"""LongHeads (Lu et al. 2024): each head of each query sees a few chunks of the row, renumbered to the trained length."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.positions.distance_plan import DistancePlan, PlanReach


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongHeads(DistancePlan):
    """A document in chunks of `chunk` tokens, of which a query sees at most `chunks`: the first, its own up to itself, the one
    before, and those whose keys fit it best, chosen for each query head. Their tokens are numbered as if nothing stood between
    them, so chunk x chunks is the trained length or less; queries with no more before them see all, as trained.

    Keys of a chunk are summed up by attention within it (`lcx/attention/chunk_summaries.py`), which takes the queries of all
    its tokens: caches hold them beside the keys, H / K heads more, and sum a chunk up once, when it is whole. Training-free;
    published for Llama-2: 16 chunks of 256.
    """

    chunk: int = 256
    chunks: int = 16

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(self.chunks >= 3, "chunks", "at least 3: the first, the one before and the query's own")

    def reach(self, trained):
        """Numbers stay below chunk x chunks at any length."""
        far = None if self.chunk * self.chunks <= trained else trained
        return PlanReach(far, far)

    @property
    def reads_queries(self):
        return True

    def held(self, q: Float[Array, "B T H D"], k: Float[Array, "B T K D"]) -> Float[Array, "B T K X"]:
        """Keys with the queries of their tokens and their heads behind them, H/K of them."""
        return jnp.concatenate([k, q.reshape(*k.shape[:3], -1)], axis=-1)

    @classmethod
    def examples(cls):
        return (cls(chunk=4, chunks=4),)
