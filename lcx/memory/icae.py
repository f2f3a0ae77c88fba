"""In-context autoencoder (Ge et al. 2023): segments of a text become a few vectors each, which the model reads in their place.

    encode   [segment | slots learned vectors] by the model with a LoRA; the last hidden states of the vectors are kept
    read     [vectors of the segments before | mark] and the segment, by the model as it is

Each segment is encoded by itself, so its vectors know nothing of those before; `most` of them are read, the newest. That is the
paper's second objective, continuation, at every segment of a text. The first, to give the text back from all its vectors, is
`lcx.objectives.autoencoding`; its mark is another. A frozen decoder (`trainable`) stays what it is: a document's first segment
is read without anything in front.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.lora import OF_ATTENTION, LoRA
from lcx.memory.model_memory import added
from lcx.memory.segment_memory import SegmentMemory, SegmentMemoryModule, pushed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ICAE(SegmentMemory):
    """slots: vectors of a segment. most: that a segment reads. lora: of the encoder."""

    slots: int
    most: int
    lora: LoRA = LoRA(rank=128)

    def validate(self):
        super().validate()
        self.check(self.slots >= 1, "slots", "at least 1")
        self.check(self.most >= self.slots, "most", f"at least slots = {self.slots}")
        plain = set(self.lora.projections) <= set(OF_ATTENTION) and self.lora.dropout == 0
        self.check(plain, "lora", "projections of attention alone, and no dropout")

    @property
    def around(self):
        return self.most + 1

    @property
    def asks(self):
        return self.segment + self.slots

    @property
    def encoder(self):
        return self.lora

    def build(self, width, *, rngs):
        return ICAEModule(self, width, rngs)

    @classmethod
    def examples(cls):
        return (cls(segment=4, slots=2, most=4, lora=LoRA(rank=2)),)


class ICAEModule(SegmentMemoryModule):
    def __init__(self, spec: ICAE, width: int, rngs: nnx.Rngs):
        self.spec = spec
        draw = lambda count: added(jax.random.normal(rngs.params(), (count, width)) / jnp.sqrt(width), (None, "width"))
        self.summary, self.continuing, self.autoencoding = draw(spec.slots), draw(1), draw(1)

    def empty(self, rows):
        return jnp.zeros((rows, self.spec.most, self.summary.shape[1])), jnp.zeros(rows, jnp.int32)

    def read(self, bank, query):
        held, count = bank
        mark = jnp.broadcast_to(self.continuing[...], (len(count), *self.continuing.shape))
        there = jnp.arange(self.spec.most) < count[:, None]
        return jnp.concatenate([held, mark], axis=1), jnp.concatenate([there, count[:, None] > 0], axis=1)

    def behind(self, bank, vectors):
        return jnp.broadcast_to(self.summary[...], (len(bank[1]), *self.summary.shape))

    def written(self, bank, hidden):
        return pushed(*bank, hidden.astype(bank[0].dtype))
