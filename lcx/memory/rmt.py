"""Recurrent Memory Transformer (Bulatov et al. 2022): vectors before a segment are rewritten by the same vectors behind it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.memory.model_memory import added
from lcx.memory.segment_memory import SegmentMemory, SegmentMemoryModule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMT(SegmentMemory):
    """slots: vectors of the memory; those at a document's start are learned."""

    slots: int

    def validate(self):
        super().validate()
        self.check(self.slots >= 1, "slots", "at least 1")

    @property
    def around(self):
        return 2 * self.slots

    def build(self, width, *, rngs):
        return RMTModule(self, width, rngs)

    @classmethod
    def examples(cls):
        return (cls(segment=4, slots=2),)


class RMTModule(SegmentMemoryModule):
    def __init__(self, spec: RMT, width: int, rngs: nnx.Rngs):
        self.start = added(jax.random.normal(rngs.params(), (spec.slots, width)) / jnp.sqrt(width), (None, "width"))

    def empty(self, rows):
        return jnp.broadcast_to(self.start[...], (rows, *self.start.shape))

    def read(self, bank, query):
        return bank, jnp.ones(bank.shape[:2], bool)

    def behind(self, bank, vectors):
        return bank

    def written(self, bank, hidden):
        return hidden.astype(bank.dtype)
