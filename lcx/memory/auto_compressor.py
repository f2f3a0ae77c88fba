"""AutoCompressor (Chevalier et al. 2023): summary tokens behind each segment, whose last hidden states stand before the next.

They are accumulated: a segment reads the summaries of all segments before it, up to `most` vectors, beyond which the oldest go.
With `accumulate` off it reads those of the one before, the paper's ablation.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.memory.model_memory import added
from lcx.memory.segment_memory import SegmentMemory, SegmentMemoryModule, pushed


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoCompressor(SegmentMemory):
    """slots: summary tokens of a segment. most: summary vectors that a segment reads."""

    slots: int
    most: int
    accumulate: bool = True

    def validate(self):
        super().validate()
        self.check(self.slots >= 1, "slots", "at least 1")
        self.check(self.most >= self.slots, "most", f"at least slots = {self.slots}")
        self.check(self.accumulate or self.most == self.slots, "most", f"slots = {self.slots} where they are not accumulated")

    @property
    def around(self):
        return self.most + self.slots

    def build(self, width, *, rngs):
        return AutoCompressorModule(self, width, rngs)

    @classmethod
    def examples(cls):
        return (cls(segment=4, slots=2, most=6), cls(segment=4, slots=1, most=1, accumulate=False))


class AutoCompressorModule(SegmentMemoryModule):
    def __init__(self, spec: AutoCompressor, width: int, rngs: nnx.Rngs):
        self.spec = spec
        self.summary = added(jax.random.normal(rngs.params(), (spec.slots, width)) / jnp.sqrt(width), (None, "width"))

    def empty(self, rows):
        return jnp.zeros((rows, self.spec.most, self.summary.shape[1])), jnp.zeros(rows, jnp.int32)

    def read(self, bank, query):
        held, count = bank
        return held, jnp.arange(self.spec.most) < count[:, None]

    def behind(self, bank, vectors):
        return jnp.broadcast_to(self.summary[...], (len(bank[1]), *self.summary.shape))

    def written(self, bank, hidden):
        held, count = bank
        return pushed(held, count if self.spec.accumulate else jnp.zeros_like(count), hidden.astype(held.dtype))
