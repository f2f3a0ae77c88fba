"""Titans' ways of joining attention and a neural memory in a layer (Behrouz et al. 2024).

    MAG, memory as a gate    y = attention(x), m = memory(x),   o = norm(y) * act(norm(m))
    MAL, memory as a layer   o = attention(norm(memory(x)))

Persistent tokens are `attention.persistent`. MAC, memory as context, is in `titans_mac.py`; LMM, the memory alone, is
`NeuralMemory`.
"""

import dataclasses
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from lcx.batch import Batch
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place, residual_gain
from lcx.mixers.neural_memory import NeuralMemory
from lcx.norms import Norm, RMSNorm
from lcx.record import record

ACTS = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


@record
class TitansState:
    attention: Any
    memory: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAG(Mixer):
    """attention: of a window in the paper. act: of the memory's normalised output."""

    attention: Attention
    memory: NeuralMemory
    act: Literal["silu", "sigmoid"] = "silu"
    norm: Norm = RMSNorm()
    sequential = True
    recurrent = True
    chunked = True

    def build(self, inherited, *, rngs):
        return TitansMAGModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (cls(**_parts()),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAL(Mixer):
    """attention: of a window in the paper."""

    attention: Attention
    memory: NeuralMemory
    norm: Norm = RMSNorm()
    sequential = True
    recurrent = True
    chunked = True

    def build(self, inherited, *, rngs):
        return TitansMALModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (cls(**_parts()),)


class _Titans(MixerModule):
    def __init__(self, spec: TitansMAG | TitansMAL, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        self.attention = spec.attention.build(inherited, rngs=rngs)
        self.memory = spec.memory.build(inherited, rngs=rngs)

    def init_state(self, batch_size, length):
        parts = {name: getattr(self, name).init_state(batch_size, length) for name in ("attention", "memory")}
        return TitansState(**parts)


class TitansMAGModule(_Titans):
    def __init__(self, spec: TitansMAG, inherited: Inherited, rngs: nnx.Rngs):
        super().__init__(spec, inherited, rngs)
        self.attention_norm, self.memory_norm = (spec.norm.build(inherited.width) for _ in range(2))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        seen, at_attention, aux = self.attention(x, batch, state and state.attention, place=place)
        held, at_memory, more = self.memory(x, batch, state and state.memory, place=place)
        y = self.attention_norm(seen) * ACTS[self.spec.act](self.memory_norm(held)) * residual_gain(self.inherited)
        return y, state and TitansState(attention=at_attention, memory=at_memory), aux | more


class TitansMALModule(_Titans):
    def __init__(self, spec: TitansMAL, inherited: Inherited, rngs: nnx.Rngs):
        super().__init__(spec, inherited, rngs)
        self.norm = spec.norm.build(inherited.width)

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        held, at_memory, more = self.memory(x, batch, state and state.memory, place=place)
        y, at_attention, aux = self.attention(self.norm(held), batch, state and state.attention, place=place)
        return y, state and TitansState(attention=at_attention, memory=at_memory), aux | more


def _parts():
    from lcx.attention.mask import Window

    attention = Attention(heads=4, kv_heads=2, head_dim=4, mask=Window(size=5), persistent=2)
    return {"attention": attention, "memory": NeuralMemory(heads=2, head_dim=4, chunk=4, expand=2)}
