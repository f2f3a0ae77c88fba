"""The ring: of a row's keys and values the newest, as many as its layer's mask reaches, whatever the length.

A step of one token takes the place of the oldest, which its query no longer sees, and is then found like the others. A longer
pass meets the ring as it was and itself, two parts of one softmax, and its newest tokens are written afterwards. So local
layers (Mistral 2023, Gemma 2024) hold their window. A window counts places within a document, so the newest tokens of a row
are those that it reaches if documents come one after the other. Where they do not, or are seen by others (shared tokens,
readers), a row is right while all of it is held; tokens that are read later are counted in `overflow`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lcx.attention.all_gather import AllGather
from lcx.attention.mask import Mask
from lcx.attention.merge import merge
from lcx.attention.sharded import sharded_attend
from lcx.attention.split_keys import split_attend, split_axes
from lcx.batch import PADDING, TokenInfo
from lcx.cache.cache import At, KeysCache
from lcx.cache.dense import grown
from lcx.cache.kv_state import no_tokens, rounded_up
from lcx.cache.store import Store, put, putting
from lcx.parallel.rules import Rules, shard
from lcx.record import record, static


@record
class RingState:
    """length: that it was made for. used: tokens written, the next goes into slot `used % S`. in_turn: whether documents came
    one after the other, ordinary ones, each in the order of its index. overflow: tokens read where some are gone that they
    may look for, as documents did not, or beyond a length that the ring holds whole."""

    remedy: ClassVar[str] = "documents of a row one after the other, or RingCache.size for all tokens of a row"

    length: int = static()
    slots: Store
    used: Int[Array, "B"]
    in_turn: Bool[Array, "B"]
    overflow: Int[Array, "B"]

    @property
    def size(self) -> int:
        return self.slots.k.shape[1]


@record
class RingPass:
    """A ring and the tokens of a pass behind those that it holds."""

    state: RingState
    new: Store


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingCache(KeysCache):
    """size: of the ring in tokens, at least the reach of its layer's mask; None is that reach. keys: whether slots hold rotated
    or raw keys."""

    size: int | None = None

    def validate(self):
        self.check(self.size is None or self.size >= 1, "size", "at least 1 token, or None for as many as the mask reaches")

    @property
    def exact(self):
        return True

    def init(self, batch_size, length, kv_heads, head_dim, value_dim, dtype, axes=1, at=At()):
        """Raises ValueError if nothing says how many tokens to hold."""
        most = at.reach if self.size is None else self.size
        if most is None:
            raise ValueError("cache.size = None: expected a number of tokens beside a mask without a bound")
        size = rounded_up(min(length, most), at.shards)
        empty = lambda channels: jnp.zeros((batch_size, size, kv_heads, channels), dtype)
        slots = Store(k=empty(head_dim), v=empty(value_dim), info=no_tokens(batch_size, size, axes))
        zero = jnp.zeros(batch_size, jnp.int32)
        return RingState(length=length, slots=slots, used=zero, in_turn=zero == 0, overflow=zero)

    def length(self, state):
        return state.length if isinstance(state, RingState) else state.state.length

    def append(self, state, k, v, info, frequencies):
        info, held = info.filled(), state.slots
        new = Store(k=self.held(k, info, frequencies).astype(held.k.dtype), v=v.astype(held.v.dtype), info=info)
        in_turn = _in_turn(state, info)
        astray = ~in_turn & (state.used + (k.shape[1] == 1) > state.size)
        missing = jnp.where(astray, (info.segments != PADDING).sum(axis=1), 0)
        state = dataclasses.replace(state, in_turn=in_turn, overflow=state.overflow + missing)
        if frequencies is not None and frequencies.by_length:
            held = dataclasses.replace(held, info=grown(held.info, info))
            state, new = dataclasses.replace(state, slots=held), dataclasses.replace(new, info=grown(info, info))
        return _written(state, new) if k.shape[1] == 1 else RingPass(state=state, new=new)

    def prune(self, state, asked, *, frequencies, rule, leader=None, rules=Rules()):
        return state if isinstance(state, RingState) else _written(state.state, state.new)

    def read(self, state, frequencies):
        return self.turned(state.slots.k, state.slots.info, frequencies), state.slots.v, state.slots.info

    def placed(self, state, rules):
        names = lambda x: ("kv_heads", None) if x.ndim == 4 else (None,) * (x.ndim - 2)
        slots = jax.tree.map(lambda x: shard(x, rules, "batch", "slots", *names(x)), state.slots)
        return dataclasses.replace(state, slots=slots)

    def attend(self, state, q, q_info, *, mask, frequencies, rules=Rules(), **options):
        """Raises ValueError for a mask that reaches further than a ring that is shorter than its rows."""
        ring = state if isinstance(state, RingState) else state.state
        _check(ring, mask)
        whole, options = dataclasses.replace(rules, sequence=()), {"mask": mask, **options}

        def found(store: Store, split: bool):
            k = self.turned(store.k, store.info, frequencies)
            if split:
                return split_attend(q, k, store.v, q_info, store.info, rules=rules, **options)
            return sharded_attend(q, k, store.v, q_info, store.info, rules=whole, communication=AllGather(), **options)

        held = found(ring.slots, bool(split_axes(rules)))
        return held if ring is state else merge(held, found(state.new, False))

    @classmethod
    def examples(cls):
        return (cls(size=16),)


def _check(ring: RingState, mask: Mask) -> None:
    if ring.size < ring.length and (mask.reach is None or mask.reach > ring.size):
        expected = (
            f"expected one that reaches at most the {ring.size} tokens that the ring holds, such as Window(size={ring.size})"
        )
        raise ValueError(f"attend: mask = {mask}: {expected}")


def _written(state: RingState, new: Store) -> RingState:
    """With the newest tokens of a pass, as many as fit, in the places of the oldest."""
    size, segments = state.size, new.info.segments
    real = segments != PADDING
    place, count = jnp.cumsum(real, axis=1), real.sum(axis=1)
    stays = real & (count[:, None] - place < size)
    slot = jnp.where(stays, (state.used[:, None] + place - 1) % size, size)
    row = jnp.arange(len(slot))[:, None]
    used = state.used + count
    beyond = jnp.maximum(used - size, 0) - jnp.maximum(state.used - size, 0) if size >= state.length else 0
    place, old = putting(slot.shape[1]), state.slots
    slots = Store(
        k=place(old.k, new.k, row, slot),
        v=place(old.v, new.v, row, slot),
        info=jax.tree.map(lambda old, new: put(old, new.astype(old.dtype), row, slot), old.info, new.info),
    )
    return dataclasses.replace(state, slots=slots, used=used, overflow=state.overflow + beyond)


def _in_turn(state: RingState, info: TokenInfo) -> Bool[Array, "B"]:
    """Whether documents still come one after the other in each row, with the tokens of a pass."""
    segments, real = info.segments, info.segments != PADDING
    newest = (state.used - 1)[:, None] % state.size
    ahead = lambda held, new: jnp.concatenate([jnp.take_along_axis(held, newest, axis=1), new], axis=1)
    there = jnp.concatenate([state.used[:, None] > 0, real], axis=1)
    before = jax.lax.cummax(jnp.where(there, jnp.arange(there.shape[1]), -1), axis=1)[:, :-1]
    of = lambda x: jnp.take_along_axis(x, jnp.maximum(before, 0), axis=1)
    slots = state.slots.info
    same = of(ahead(slots.segments, segments)) == segments
    follows = jnp.where(same, of(ahead(slots.index, info.index)) < info.index, info.index == 0) | (before < 0)
    return state.in_turn & (~real | (follows & (segments > 0))).all(axis=1)
