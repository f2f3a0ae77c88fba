"""Language modelling in segments of lengths drawn anew in each step (AutoCompressor, Chevalier et al. 2023).

A memory between segments that was trained at one length expects it; one that met many reads others too.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from lcx.batch import Batch
from lcx.memory.segment_memory import SegmentMemory
from lcx.objectives.language_modeling import LanguageModeling


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSegments(LanguageModeling):
    """Lengths are even draws from the memory's `shortest` to its `segment`, the same for all documents of a row."""

    def loss(self, model, batch, key):
        """Raises ValueError for a model whose memory names no shortest segment."""
        memory = model.spec.memory
        if not isinstance(memory, SegmentMemory) or memory.shortest is None:
            raise ValueError("random segments: expected a model with a memory between segments, of which `shortest` is set")
        places = self.drawn(memory, batch, key)
        return super().loss(model, dataclasses.replace(batch, side={**batch.side, "places": places}), key)

    def drawn(self, memory: SegmentMemory, batch: Batch, key) -> Int[Array, "B T"]:
        """The place of each token: `segment` times the number of its segment, and what stands before it there."""
        index = jnp.asarray(batch.info.index)
        count = -(-index.shape[1] // memory.shortest)
        lengths = jax.random.randint(key, (len(index), count), memory.shortest, memory.segment + 1)
        ends = jnp.cumsum(lengths, axis=1)
        number = jax.vmap(lambda ends, index: jnp.searchsorted(ends, index, side="right"))(ends, index)
        start = jnp.take_along_axis(jnp.pad(ends, ((0, 0), (1, 0))), number, axis=1)
        return (number * memory.segment + index - start).astype(jnp.int32)

    @classmethod
    def examples(cls):
        return (cls(), cls(chunk=3))
