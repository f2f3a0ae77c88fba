"""Hierarchical Memory Transformer (He et al. 2024): segments recall what earlier ones left by attending to it.

    query    s = last hidden state of [mark | tokens | mark], the model read by itself
    recall   p = softmax((s Wq) (M Wk)^T / sqrt(size)) M over the last `bank` vectors M; a learned p where there are none
    segment  [p | last `sensory` tokens of the segment before | segment | p], whose last hidden state goes into the bank

The paper makes the query from the first half of the segment itself, so what a token recalls depends on later tokens:
`query="ahead"` is that, for comparison; it cannot generate, and the first half's own loss is contaminated. By default the query
is made from the last tokens of the segment before. Without `recall` p is the vector that the segment before left: stage 1 of
the paper's training, with which stage 2 begins.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.memory.model_memory import added
from lcx.memory.segment_memory import SegmentMemory, SegmentMemoryModule, pushed


@dataclasses.dataclass(frozen=True, kw_only=True)
class HMT(SegmentMemory):
    """sensory: tokens of the segment before that are read again. bank: vectors that are kept. fraction: of a segment's tokens,
    which the query is made from. size: of the recall's queries and keys."""

    sensory: int = 0
    bank: int = 300
    recall: bool = True
    query: Literal["behind", "ahead"] = "behind"
    fraction: float = 0.5
    size: int

    def validate(self):
        super().validate()
        self.check(0 <= self.sensory <= self.segment, "sensory", f"0 to segment = {self.segment}")
        self.check(self.bank >= 1, "bank", "at least 1")
        self.check(self.size >= 1, "size", "at least 1")
        self.check(0 < self.fraction <= 1, "fraction", "above 0, at most 1")
        self.check(self.recall or self.query == "behind", "query", "'behind' without recall, which asks nothing")

    @property
    def around(self):
        return 2 + self.sensory

    @property
    def asked(self) -> int:
        """Tokens that a query is made from."""
        return max(1, round(self.segment * self.fraction)) if self.recall else 0

    @property
    def asks(self):
        return 2 + self.asked if self.recall else 0

    def build(self, width, *, rngs):
        return HMTModule(self, width, rngs)

    @classmethod
    def examples(cls):
        return (
            cls(segment=4, sensory=2, bank=2, size=3),
            cls(segment=4, sensory=1, bank=1, size=3, recall=False),
        )


class HMTModule(SegmentMemoryModule):
    def __init__(self, spec: HMT, width: int, rngs: nnx.Rngs):
        self.spec, self.sensory = spec, spec.sensory
        self.asked = spec.asked
        self.ahead = spec.query == "ahead"
        draw = lambda *shape: jax.random.normal(rngs.params(), shape) / jnp.sqrt(width)
        self.start = added(draw(1, width), (None, "width"))
        if spec.recall:
            self.summary = added(draw(1, width), (None, "width"))
            self.recall_query, self.recall_key = (added(draw(width, spec.size), ("width", None)) for _ in range(2))

    def empty(self, rows):
        return jnp.zeros((rows, self.spec.bank, self.start.shape[1])), jnp.zeros(rows, jnp.int32)

    def read(self, bank, query):
        held, count = bank
        there = jnp.arange(self.spec.bank) < count[:, None]
        if self.spec.recall:
            q, keys = query.astype(jnp.float32) @ self.recall_query[...], held @ self.recall_key[...]
            scores = jnp.einsum("bd,bnd->bn", q, keys) / jnp.sqrt(self.spec.size)
            weights = jax.nn.softmax(jnp.where(there, scores, -1e30), axis=-1)
            found = jnp.einsum("bn,bnm->bm", weights, held)
        else:
            found = jnp.take_along_axis(held, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        found = jnp.where((count > 0)[:, None], found, self.start[0])
        return found[:, None], jnp.ones((len(count), 1), bool)

    def behind(self, bank, vectors):
        return vectors

    def written(self, bank, hidden):
        return pushed(*bank, hidden.astype(bank[0].dtype))

    def mark(self, rows):
        return jnp.broadcast_to(self.summary[...], (rows, *self.summary.shape))
