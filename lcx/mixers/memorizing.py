"""Memorizing Transformers (Wu et al. 2022): beside its attention a layer looks up the nearest of many earlier keys, exactly.

Keys and values of the last `entries` tokens of its document, in whole segments before the query's own, are kept as they were,
without gradient. With q and k scaled to length 1,

    near      the `near` entries with the largest q.k, of each query head
    external  softmax(s q.k) over these, s learned for each head
    out       g external + (1 - g) attention, g = sigmoid(b) of the head

An entry has no position. The paper's approximate search compares entries in groups; here none is missed. Where there are no
entries yet, the attention alone answers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, Batch, TokenInfo
from lcx.memory.document_chunks import document_chunks
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place
from lcx.mixers.neighbours import resumed, torn
from lcx.parallel.rules import whole_rows
from lcx.record import record
from pallas_kernels.grouped_scan import chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorizingAttention(Mixer):
    """attention: of near tokens, any. segment: tokens that are written together. entries: of a head, a multiple of it. scale:
    of scores, at first."""

    attention: Attention
    segment: int = 512
    entries: int = 8192
    near: int = 32
    scale: float = 10.0
    sequential = True
    recurrent = True
    chunked = True

    def validate(self):
        self.check(self.segment >= 1, "segment", "at least 1 token")
        self.check(self.entries >= 1 and self.entries % self.segment == 0, "entries", f"a multiple of segment = {self.segment}")
        self.check(1 <= self.near <= self.entries, "near", f"from 1 to entries = {self.entries}")
        self.check(self.scale > 0, "scale", "a positive number")

    def build(self, inherited, *, rngs):
        return MemorizingAttentionModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        attention = Attention(heads=4, kv_heads=2, head_dim=4)
        return (cls(attention=attention, segment=4, entries=8, near=3),)


@record
class MemorizingState:
    """keys, values: entries, oldest first, where `held`, and behind them those of the open segment, where `filled`."""

    attention: Any
    keys: Float[Array, "B S K D"]
    values: Float[Array, "B S K E"]
    held: Bool[Array, "B N"]
    filled: Bool[Array, "B C"]
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class MemorizingAttentionModule(MixerModule):
    def __init__(self, spec: MemorizingAttention, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        self.attention = spec.attention.build(inherited, rngs=rngs)
        self.memory_bias = nnx.Param(jnp.zeros(spec.attention.heads), axes=("heads",))
        self.memory_scale = nnx.Param(jnp.full(spec.attention.heads, spec.scale), axes=("heads",))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        after: dict[str, Any] = {}

        def beside(out, q, k, v):
            rules, heads = self.inherited.rules, self.spec.attention
            q, k = unit(whole_rows(q, rules=rules, heads=heads.heads)), unit(whole_rows(k, rules=rules, heads=heads.kv_heads))
            k, v = jax.lax.stop_gradient((k, whole_rows(v, rules=rules, heads=heads.kv_heads)))
            found, some, broken, after["state"] = self._looked_up(q, k, v, batch.info, state)
            share = jnp.where(some[..., None], jax.nn.sigmoid(self.memory_bias[...]), 0.0)[..., None]
            return jnp.where(broken[..., None, None], jnp.nan, share * found + (1 - share) * out)

        held = None if state is None else state.attention
        y, held, aux = self.attention(x, batch, held, place=place, beside=beside)
        return y, None if state is None else dataclasses.replace(after["state"], attention=held), aux

    def _looked_up(self, q, k, v, info: TokenInfo, state: MemorizingState | None):
        """(external, whether there are entries, tokens that cannot be answered, state)."""
        if state is None:
            return *self._many(q, k, v, info, state)[:2], torn(info, within=False), None
        if q.shape[1] == 1:
            found, some, after, lost = *self._one(q, k, v, info, state), None
        else:
            found, some, after, lost = self._many(q, k, v, info, state)
        broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=lost)
        return found, some, broken, dataclasses.replace(after, index=index, segments=segments)

    def _many(self, q, k, v, info: TokenInfo, state: MemorizingState | None):
        size, most, rows = self.spec.segment, self.spec.entries, q.shape[0]
        before = self.init_memory(rows) if state is None else state
        chunks = document_chunks(info, size, self.inherited.documents, None if state is None else before.filled.sum(axis=1))
        n = chunks.count.shape[1]
        real = chunks.gather((info.segments != PADDING).astype(jnp.int32)) > 0
        laid_q, laid_k, laid_v = (chunks.gather(y) for y in (q, k, v))
        if state is not None:  # the open segment is the first
            first = jnp.pad(before.filled, ((0, 0), (0, (n - 1) * size)))
            behind = lambda y: jnp.pad(y[:, most:], ((0, 0), (0, (n - 1) * size), (0, 0), (0, 0)))
            laid_k = jnp.where(first[..., None, None], behind(before.keys), laid_k)
            laid_v = jnp.where(first[..., None, None], behind(before.values), laid_v)
            real = real | first
        # A segment of room in front: if the first segment stays empty, what may be read reaches as much farther back.
        joined = lambda old, new: jnp.concatenate([jnp.zeros_like(old[:, :size]), old[:, :most], new], axis=1)
        keys, values = joined(before.keys, laid_k), joined(before.values, laid_v)
        document = jnp.cumsum(chunks.begins, axis=1)  # of each segment; 0 is the one that goes on
        of_slot = jnp.where(real, jnp.repeat(document, size, axis=1), -1)
        of_slot = jnp.concatenate([jnp.full((rows, size), -1), jnp.where(before.held, 0, -1), of_slot], axis=1)

        def newest(there):
            return there & (jnp.cumsum(there[:, ::-1], axis=1)[:, ::-1] <= most)

        def segment(given):
            c, asked, own = given
            part = lambda y: jax.lax.dynamic_slice_in_dim(y, c * size, most + size, axis=1)
            there = newest(part(of_slot) == own[:, None])
            return self.external(asked, part(keys), part(values), there), there.any(axis=1)

        cut = lambda y: jnp.moveaxis(y.reshape(rows, n, size, *y.shape[2:]), 1, 0)
        found, some = jax.lax.map(jax.checkpoint(segment), (jnp.arange(n), cut(laid_q), document.T))
        found = chunks.scatter(jnp.moveaxis(found, 0, 1).reshape(rows, n * size, *found.shape[3:]))
        some = chunks.scatter(jnp.repeat(some.T, size, axis=1).astype(jnp.float32)) > 0
        if state is None:
            return found, some, None, chunks.lost
        last = jnp.max(jnp.where(chunks.count > 0, jnp.arange(n), 0), axis=1)[:, None]
        end = last + (jnp.take_along_axis(chunks.count, last, axis=1) == size)  # the first segment that is not written yet
        slots = end * size + jnp.arange(most + 2 * size)
        wide = lambda y: jnp.pad(y, ((0, 0), (0, size)) + ((0, 0),) * (y.ndim - 2))
        at = lambda y, slots: jnp.take_along_axis(y, slots.reshape(*slots.shape, *[1] * (y.ndim - 2)), axis=1)
        there = at(wide(of_slot == jnp.take_along_axis(document, last, axis=1)), slots)
        held = newest(there[:, : most + size])
        order = jnp.argsort(held, axis=1, stable=True)[:, size:]  # entries behind what is none
        entries = lambda y: jnp.concatenate([at(at(wide(y), slots), order), at(wide(y), slots[:, most + size :])], axis=1)
        held, filled = at(held, order), there[:, most + size :]
        after = dataclasses.replace(state, keys=entries(keys), values=entries(values), held=held, filled=filled)
        return found, some, after, chunks.lost

    def _one(self, q, k, v, info: TokenInfo, state: MemorizingState):
        size, most = self.spec.segment, self.spec.entries
        index, real = info.index[:, 0], info.segments[:, 0] != PADDING
        kept = ~(real & (index == 0))[:, None]
        held, filled = state.held & kept, state.filled & kept
        found = self.external(q, state.keys[:, :most], state.values[:, :most], held)
        here = (jnp.arange(size) == (index % size)[:, None]) & real[:, None]
        at = jnp.pad(here, ((0, 0), (most, 0)))[..., None, None]
        keys, values = jnp.where(at, k, state.keys), jnp.where(at, v, state.values)
        filled = filled | here
        whole = real & (index % size == size - 1)
        moved = lambda y: jnp.pad(y[:, size:], ((0, 0), (0, size)) + ((0, 0),) * (y.ndim - 2))

        def write(keys, values, held):
            return chosen(
                whole, (moved(keys), moved(values), jnp.concatenate([held, filled], axis=1)[:, size:]), (keys, values, held)
            )

        keys, values, after = jax.lax.cond(whole.any(), write, lambda *same: same, keys, values, held)
        some = held.any(axis=1, keepdims=True)
        state = dataclasses.replace(state, keys=keys, values=values, held=after, filled=filled & ~whole[:, None])
        return found, some, state

    def external(
        self,
        q: Float[Array, "B C H D"],
        keys: Float[Array, "B N K D"],
        values: Float[Array, "B N K E"],
        there: Bool[Array, "B N"],
    ) -> Float[Array, "B C H E"]:
        """What queries of length 1 find in entries of length 1; 0 where none is there."""
        group = q.shape[2] // keys.shape[2]
        each = lambda y: jnp.moveaxis(jnp.repeat(y, group, axis=2), 1, 2)  # [B,H,N,...]
        keys, values = each(keys), each(values)
        scores = jnp.einsum("bchd,bhnd->bhcn", q, keys, precision="highest")
        seen = there[:, None, None]
        _, near = jax.lax.top_k(jnp.where(seen, jax.lax.stop_gradient(scores), -2.0), self.spec.near)
        scores = jnp.take_along_axis(scores, near, axis=-1)
        seen = jnp.take_along_axis(jnp.broadcast_to(seen, (*scores.shape[:3], there.shape[1])), near, axis=-1)
        scale = jnp.abs(self.memory_scale[...])[:, None, None]
        weights = jax.nn.softmax(jnp.where(seen, scale * scores, -1e30), axis=-1) * seen
        found = jax.vmap(jax.vmap(lambda value, index: value[index]))(values, near)  # [B,H,C,near,E]
        return jnp.einsum("bhcn,bhcne->bche", weights, found, precision="highest")

    def init_memory(self, rows: int) -> MemorizingState:
        spec, heads = self.spec, self.spec.attention
        blank = jnp.zeros((rows, spec.entries + spec.segment, heads.kv_heads, heads.head_dim))
        none = jnp.zeros(rows, jnp.int32)
        held, filled = jnp.zeros((rows, spec.entries), bool), jnp.zeros((rows, spec.segment), bool)
        return MemorizingState(attention=None, keys=blank, values=blank, held=held, filled=filled, index=none, segments=none)

    def init_state(self, batch_size, length):
        return dataclasses.replace(self.init_memory(batch_size), attention=self.attention.init_state(batch_size, length))


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scaled to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
