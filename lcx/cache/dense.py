"""The dense cache: every key and value of the row, in a preallocated array, one slot a token.

Each row fills its own slots in order.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.attention.all_gather import AllGather
from lcx.attention.sharded import sharded_attend
from lcx.attention.split_keys import split_attend, split_axes
from lcx.batch import PADDING, TokenInfo
from lcx.cache.cache import At, KeysCache
from lcx.cache.store import put, putting
from lcx.parallel.rules import Rules, shard
from lcx.record import record


@record
class DenseState:
    """k, v: the slots. info: the TokenInfo each slot was written with (segment 0: empty). used: slots filled a row."""

    remedy: ClassVar[str] = "rows of fewer tokens, or a state that was made for more"

    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K E"]
    info: TokenInfo
    used: Int[Array, "B"]
    overflow: Int[Array, "B"]


def grown(slots: TokenInfo, new: TokenInfo) -> TokenInfo:
    """The slots of each row with the lengths of its newest tokens: a document that grew is longer for all of it."""
    same = (slots.segments[:, :, None] == new.segments[:, None]) & (new.segments[:, None] != PADDING)
    newest = jnp.where(same, new.lengths[:, None], 0).max(axis=2, initial=0)
    return dataclasses.replace(slots, lengths=jnp.maximum(slots.lengths, newest))


def newest(state: DenseState, count: int) -> DenseState:
    """The state with at most its `count` newest tokens, in the first slots."""
    length = state.k.shape[1]
    place = jnp.arange(length) + jnp.maximum(state.used - count, 0)[:, None]
    there, place = place < state.used[:, None], jnp.minimum(place, length - 1)
    take = lambda x: jnp.take_along_axis(x, place.reshape(*place.shape, *[1] * (x.ndim - 2)), axis=1)
    info = jax.tree.map(take, state.info)
    info = dataclasses.replace(info, segments=jnp.where(there, info.segments, PADDING))
    return dataclasses.replace(state, k=take(state.k), v=take(state.v), info=info, used=jnp.minimum(state.used, count))


def without_newest(state: DenseState, count: Int[Array, "B"]) -> DenseState:
    """The state before its `count` newest tokens."""
    used = state.used - count
    there = jnp.arange(state.k.shape[1]) < used[:, None]
    info = dataclasses.replace(state.info, segments=jnp.where(there, state.info.segments, PADDING))
    return dataclasses.replace(state, info=info, used=used)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCache(KeysCache):
    """keys: whether slots hold rotated or raw keys."""

    @property
    def exact(self):
        return True

    def init(self, batch_size, length, kv_heads, head_dim, value_dim, dtype, axes=1, at=At()):
        empty = jnp.zeros((batch_size, length), jnp.int32)
        info = TokenInfo(
            index=empty,
            order=empty,
            positions=jnp.zeros((batch_size, length, axes), jnp.float32),
            segments=jnp.full_like(empty, PADDING),
            roles=empty,
            lengths=empty,
        )
        return DenseState(
            k=jnp.zeros((batch_size, length, kv_heads, head_dim), dtype),
            v=jnp.zeros((batch_size, length, kv_heads, value_dim), dtype),
            info=info,
            used=empty[:, 0],
            overflow=empty[:, 0],
        )

    def length(self, state):
        return state.k.shape[1]

    def append(self, state, k, v, info, frequencies):
        k = self.held(k, info, frequencies)
        info = info.filled()
        real = info.segments != PADDING
        length = self.length(state)
        slot = state.used[:, None] + jnp.cumsum(real, axis=1) - 1
        slot = jnp.where(real, slot, length)  # out of range: dropped by the scatter
        row = jnp.arange(k.shape[0])[:, None]
        write = lambda old, new: put(old, new.astype(old.dtype), row, slot)
        count = state.used + real.sum(axis=1)
        slots = jax.tree.map(write, state.info, info)
        if frequencies is not None and frequencies.by_length:
            slots = grown(slots, info)
        place = putting(k.shape[1])
        k, v = (place(old, new.astype(old.dtype), row, slot) for old, new in ((state.k, k), (state.v, v)))
        return DenseState(
            k=k,
            v=v,
            info=slots,
            used=jnp.minimum(count, length),
            overflow=state.overflow + jnp.maximum(count - length, 0),
        )

    def rewrite(self, state, before, keys):
        new = jnp.arange(self.length(state)) >= before.used[:, None]
        return dataclasses.replace(state, k=keys(state.k, state.v, state.info, new))

    def read(self, state, frequencies):
        return self.turned(state.k, state.info, frequencies), state.v, state.info

    def placed(self, state, rules):
        keys = lambda x: shard(x, rules, "batch", "slots", "kv_heads", None)
        infos = lambda x: shard(x, rules, "batch", "slots", *(None,) * (x.ndim - 2))
        return dataclasses.replace(state, k=keys(state.k), v=keys(state.v), info=jax.tree.map(infos, state.info))

    def attend(self, state, q, q_info, *, frequencies, rules=Rules(), **options):
        k, v, info = self.read(state, frequencies)
        if split_axes(rules):
            return split_attend(q, k, v, q_info, info, rules=rules, **options)
        whole = dataclasses.replace(rules, sequence=())
        return sharded_attend(q, k, v, q_info, info, rules=whole, communication=AllGather(), **options)

    @classmethod
    def examples(cls):
        return (cls(), cls(keys="raw"))
