"""The contract of memories between segments: what a decoder that reads one segment at a time knows of those before.

`Decoder.memory` takes one. Each document is cut into segments of `segment` tokens; what the memory gives is read in front of a
segment, as embeddings at the first positions, and what it asks for stands behind, whose last hidden states it keeps:

    [vectors of the memory | last tokens of the segment before | segment | vectors to write with]

A segment is a causal text of its own, whose positions begin at 0. Its parameters are `added` to a trained decoder's.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.lora import LoRA
from lcx.memory.model_memory import ModelMemory

Vectors = tuple[Float[Array, "B p M"], Bool[Array, "B p"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentMemory(ModelMemory):
    """segment: its tokens. bptt: gradients go through groups of so many segments, counted from a row's start, and not from one
    to the one before; None is all of a row. shortest: of segments whose lengths training draws (`RandomSegments`)."""

    segment: int
    bptt: int | None = None
    shortest: int | None = None
    chunked: ClassVar[bool] = True

    def validate(self):
        self.check(self.segment >= 1, "segment", "at least 1 token")
        self.check(self.bptt is None or self.bptt >= 1, "bptt", "at least 1 segment, or None")
        fits = self.shortest is None or 1 <= self.shortest <= self.segment
        self.check(fits, "shortest", f"1 to segment = {self.segment}, or None")

    @property
    @abc.abstractmethod
    def around(self) -> int:
        """Positions that the decoder reads around a segment's tokens, at most."""

    @property
    def asks(self) -> int:
        """Positions that it reads for a segment's query."""
        return 0

    @property
    def encoder(self) -> LoRA | None:
        """What is added to the model where a segment is encoded by itself; None where the vectors to write with stand behind
        it as it is read."""
        return None

    @abc.abstractmethod
    def build(self, width: int, *, rngs: nnx.Rngs) -> "SegmentMemoryModule":
        """The module with its parameters."""


class SegmentMemoryModule(nnx.Module):
    """Pure functions of a bank, a pytree with leading axis B. sensory: tokens of the segment before that are read again. asked:
    tokens from which a query is made, 0 without. ahead: whether these are the segment's own first ones, so that what is
    recalled for its first token knows of later ones; else they are the last of the segment before.
    """

    sensory: int = 0
    asked: int = 0
    ahead: bool = False

    def empty(self, rows: int) -> Any:
        """The bank at a document's start."""
        raise NotImplementedError(f"{type(self).__name__} must define empty")

    def read(self, bank: Any, query: Float[Array, "B M"] | None) -> Vectors:
        """(vectors in front of the segment, which of them are there)."""
        raise NotImplementedError(f"{type(self).__name__} must define read")

    def behind(self, bank: Any, vectors: Float[Array, "B p M"]) -> Float[Array, "B s M"]:
        """Vectors behind the segment, given those in front."""
        raise NotImplementedError(f"{type(self).__name__} must define behind")

    def written(self, bank: Any, hidden: Float[Array, "B s M"]) -> Any:
        """The bank after a segment whose last rows these are."""
        raise NotImplementedError(f"{type(self).__name__} must define written")

    def mark(self, rows: int) -> Float[Array, "B 1 M"]:
        """What stands before and behind the tokens that a query is made from; asked for only where `asked` is not 0."""
        raise NotImplementedError(f"{type(self).__name__} must define mark")


def pushed(
    held: Float[Array, "B N M"], count: Int[Array, "B"], new: Float[Array, "B s M"]
) -> tuple[Float[Array, "B N M"], Int[Array, "B"]]:
    """(vectors, count) with new ones behind the `count` that are there; where there is no room, the oldest go."""
    most, size = held.shape[1], new.shape[1]
    over = jnp.maximum(count + size - most, 0)
    wide = jnp.concatenate([held, jnp.zeros_like(new)], axis=1)
    places = jnp.arange(most + size)
    spread = jnp.take_along_axis(new, jnp.clip(places - count[:, None], 0, size - 1)[..., None], axis=1)
    wide = jnp.where((places >= count[:, None])[..., None] & (places < (count + size)[:, None])[..., None], spread, wide)
    kept = jnp.take_along_axis(wide, (jnp.arange(most) + over[:, None])[..., None], axis=1)
    return kept, jnp.minimum(count + size, most)
