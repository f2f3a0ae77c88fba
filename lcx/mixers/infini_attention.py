"""Infini-attention (Munkhdalai et al. 2024): attention within segments, and a matrix a head of what stood in those before.

With s(x) = elu(x) + 1, of queries and keys that no rotation turns, and M, z as the segment before left them:

    out      g s(q) M / (s(q) z) + (1 - g) attention within the segment, g = sigmoid(b) of the head
    write    M + sum_t s(k_t)^T v_t, or with the delta rule s(k_t)^T (v_t - s(k_t) M / (s(k_t) z)); z + sum_t s(k_t)

A document begins with an empty memory, which gives 0. M and z are float32; z grows with the document. In generation the
attention's own cache holds all tokens, as of any attention within chunks.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import Chunk
from lcx.batch import PADDING, Batch, TokenInfo
from lcx.memory.document_chunks import document_chunks
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place
from lcx.mixers.neighbours import resumed, torn
from lcx.parallel.rules import whole_rows
from lcx.record import record
from pallas_kernels.grouped_scan import chosen, grouped_scan

LEAST = 1e-6  # of s(q) z


@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniAttention(Mixer):
    """attention: within segments, its mask Chunk(size=...). rule: of the write."""

    attention: Attention
    rule: Literal["linear", "delta"] = "delta"
    sequential = True
    recurrent = True
    chunked = True

    def validate(self):
        self.check(isinstance(self.attention.mask, Chunk), "attention", "one whose mask is Chunk(size=...), the segments")

    @property
    def segment(self) -> int:
        return self.attention.mask.size

    def build(self, inherited, *, rngs):
        return InfiniAttentionModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        attention = Attention(heads=4, kv_heads=2, head_dim=4, mask=Chunk(size=4))
        return (cls(attention=attention), cls(attention=attention, rule="linear"))


@record
class InfiniState:
    """memory, norm: at the start of the open segment, of which keys and values are held in the slots that are `filled`."""

    attention: Any
    memory: Float[Array, "B H D E"]
    norm: Float[Array, "B H D"]
    keys: Float[Array, "B C H D"]
    values: Float[Array, "B C H E"]
    filled: Bool[Array, "B C"]
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class InfiniAttentionModule(MixerModule):
    def __init__(self, spec: InfiniAttention, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        self.attention = spec.attention.build(inherited, rngs=rngs)
        self.memory_bias = nnx.Param(jnp.zeros(spec.attention.heads), axes=("heads",))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        after: dict[str, Any] = {}

        def beside(out, q, k, v):
            heads = self.spec.attention.heads
            whole = lambda y: whole_rows(jnp.repeat(y, heads // y.shape[2], axis=2), rules=self.inherited.rules, heads=heads)
            q, k, v = map(whole, (q, k, v))
            found, broken, after["state"] = self._memory(shifted(q), shifted(k), v, batch.info, state)
            share = jax.nn.sigmoid(self.memory_bias[...])[:, None]
            out = share * found + (1 - share) * out
            return jnp.where(broken[..., None, None], jnp.nan, out)

        held = None if state is None else state.attention
        y, held, aux = self.attention(x, batch, held, place=place, beside=beside)
        return y, None if state is None else dataclasses.replace(after["state"], attention=held), aux

    def _memory(self, q, k, v, info: TokenInfo, state: InfiniState | None):
        """(what the memory gives, tokens that cannot be answered, state)."""
        size, rows = self.spec.segment, q.shape[0]
        opened = None if state is None else state.filled.sum(axis=1)
        chunks = document_chunks(info, size, self.inherited.documents, opened)
        n = chunks.count.shape[1]
        cut = lambda y: jnp.moveaxis(chunks.gather(y).reshape(rows, n, size, *y.shape[2:]), 1, 0)
        q, k, v, real = map(cut, (q, k, v, (info.segments != PADDING).astype(jnp.float32)))
        if state is None:
            start, broken = self._empty(rows), torn(info, within=False)
        else:
            held = lambda first, new: new.at[0].set(jnp.where(state.filled[..., None, None], first, new[0]))
            k, v = held(state.keys, k), held(state.values, v)
            real = real.at[0].max(state.filled.astype(jnp.float32))
            start = (state.memory, state.norm)
            broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=chunks.lost)
        whole = (chunks.count == size).T
        parts = (q, k * real[..., None, None], v, chunks.begins.T, whole)
        (memory, norm), found = grouped_scan(self._segment, start, parts, group=4)
        out = chunks.scatter(jnp.moveaxis(found, 0, 1).reshape(rows, n * size, *found.shape[3:]))
        if state is None:
            return out, broken, None
        last = jnp.max(jnp.where(chunks.count > 0, jnp.arange(n), 0), axis=1)
        newest = lambda y: y[last, jnp.arange(rows)]
        filled = (newest(real) > 0) & ~newest(whole)[:, None]
        state = dataclasses.replace(
            state, memory=memory, norm=norm, keys=newest(k), values=newest(v), filled=filled, index=index, segments=segments
        )
        return out, broken, state

    def _segment(self, held, given):
        """One segment of all rows, [B,C,H,...]."""
        q, k, v, begins, whole = given
        memory, norm = chosen(begins, self._empty(len(q)), held)
        product = lambda *given: jnp.einsum(*given, precision="highest")

        def read(x):
            below = jnp.maximum(product("bchd,bhd->bch", x, norm), LEAST)
            return product("bchd,bhde->bche", x, memory) / below[..., None]

        added = v - read(k) if self.spec.rule == "delta" else v
        after = (memory + product("bchd,bche->bhde", k, added), norm + k.sum(axis=1))
        return chosen(whole, after, (memory, norm)), read(q)

    def _empty(self, rows: int):
        heads, dim = self.spec.attention.heads, self.spec.attention.head_dim
        return jnp.zeros((rows, heads, dim, dim)), jnp.zeros((rows, heads, dim))

    def init_state(self, batch_size, length):
        size, heads, dim = self.spec.segment, self.spec.attention.heads, self.spec.attention.head_dim
        memory, norm = self._empty(batch_size)
        none, blank = jnp.zeros(batch_size, jnp.int32), jnp.zeros((batch_size, size, heads, dim))
        return InfiniState(
            attention=self.attention.init_state(batch_size, length),
            memory=memory,
            norm=norm,
            keys=blank,
            values=blank,
            filled=jnp.zeros((batch_size, size), bool),
            index=none,
            segments=none,
        )


def shifted(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """elu(x) + 1."""
    return jax.nn.elu(x) + 1
