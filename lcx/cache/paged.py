"""The paged cache: keys and values of all rows in one pool of pages, so that rows of other lengths share the memory.

A row takes a page when its tokens need one; who seats rows gives back those of a row that has ended (PagedAttention, Kwon et
al. 2023). Attention gathers the pages of each row, a span of slots at a time, and merges what it finds. Tokens are coded as
they come, so that their own pass too reads what their codes stand for. No gradient.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.attention.all_gather import AllGather
from lcx.attention.merge import merge
from lcx.attention.sharded import sharded_attend
from lcx.attention.split_keys import split_axes
from lcx.cache.cache import At, KeysCache
from lcx.cache.codecs.codec import Codec, Quantizer
from lcx.cache.codecs.plain import Plain
from lcx.cache.kv_state import no_tokens, rounded_up
from lcx.cache.pages import PagedState
from lcx.cache.spans import SPAN
from lcx.parallel.gathered import axes_size
from lcx.parallel.rules import Rules, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache(KeysCache):
    """page: tokens of one. pages: of the pool; None is as many as all rows can fill. codec: how pages hold keys and values, one
    that codes each token by itself. keys: whether they hold rotated or raw keys."""

    page: int = 64
    pages: int | None = None
    codec: Codec = Plain()

    def validate(self):
        self.check(self.page >= 1, "page", "at least 1 token")
        self.check(self.pages is None or self.pages >= 1, "pages", "at least 1, or None for as many as all rows can fill")
        alone = self.codec.block == 1 and not self.codec.first and not self.codec.recent and not self.codec.by_layer
        self.check(alone, "codec", "one that codes each token by itself: Plain(), Int8() or Fp8(); others are for KVCache")

    @property
    def exact(self):
        return self.codec == Plain()

    def fits(self, lengths: Sequence[int]) -> bool:
        return self.pages is None or sum(-(-length // self.page) for length in lengths) <= self.pages

    def init(self, batch_size, length, kv_heads, head_dim, value_dim, dtype, axes=1, at=At()):
        each = -(-length // self.page)
        pool = batch_size * each if self.pages is None else min(self.pages, batch_size * each)
        if each > (span := self._span):
            each = rounded_up(each, span)
        empty = lambda coder, size: _coded(coder, jnp.zeros((pool, self.page, kv_heads, size), dtype))
        zero = jnp.zeros(batch_size, jnp.int32)
        return PagedState(
            length=length,
            k=empty(self.codec.keys, head_dim),
            v=empty(self.codec.values, value_dim),
            table=jnp.full((batch_size, each), pool, jnp.int32),
            info=no_tokens(batch_size, each * self.page, axes),
            used=zero,
            free=jnp.arange(pool, dtype=jnp.int32)[::-1],
            left=jnp.full(1, pool, jnp.int32),
            overflow=zero,
        )

    def length(self, state):
        return state.length

    def append(self, state, k, v, info, frequencies):
        by_length = frequencies is not None and frequencies.by_length
        k = _coded(self.codec.keys, self.held(k, info, frequencies))
        return state.put(k, _coded(self.codec.values, v), info.filled(), by_length)

    def read(self, state, frequencies):
        return self._slots(state, 0, state.table.shape[1], frequencies)

    def placed(self, state, rules):
        """Raises ValueError where rows or slots are shared out: rows draw on one pool."""
        if axes_size(rules.batch) > 1 or split_axes(rules):
            raise ValueError(
                "cache: rows or slots shared out over devices: expected another than a PagedCache, which has one pool"
            )
        pool = lambda x: shard(x, rules, None, None, "kv_heads", *(None,) * (x.ndim - 3))
        return dataclasses.replace(state, k=jax.tree.map(pool, state.k), v=jax.tree.map(pool, state.v))

    def attend(self, state, q, q_info, *, frequencies, rules=Rules(), **options):
        whole = dataclasses.replace(rules, sequence=())

        def part(first, pages: int):
            k, v, info = self._slots(state, first, pages, frequencies)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
            return sharded_attend(q, k, v, q_info, info, rules=whole, communication=AllGather(), **options)

        pages, span = state.table.shape[1], self._span
        if pages <= span:
            return part(0, pages)
        turns = -(-state.used.max(initial=0) // (span * self.page))
        width = jax.tree.leaves(state.v)[0].shape[3]
        nothing = jnp.zeros((*q.shape[:3], width)), jnp.full(q.shape[:3], -jnp.inf)
        return jax.lax.fori_loop(0, turns, lambda n, found: merge(found, part(n * span, span)), nothing)

    def _slots(self, state: PagedState, first, pages: int, frequencies):
        """Keys, rotated, values and infos of some pages of every row."""
        k, v, info = state.gathered(first, pages)
        k, v = _decoded(self.codec.keys, k), _decoded(self.codec.values, v)
        return self.turned(k, info, frequencies), v, info

    @property
    def _span(self) -> int:
        """Pages that are gathered at a time."""
        return max(SPAN // self.page, 1)

    @classmethod
    def examples(cls):
        return (cls(page=3, keys="raw"),)


def _coded(coder: Quantizer, x: Float[Array, "B T K D"]) -> Any:
    """Codes [B, T, K, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), coder.encode(jnp.moveaxis(x, 1, 2)))


def _decoded(coder: Quantizer, codes: Any) -> Float[Array, "B T K D"]:
    return jnp.moveaxis(coder.decode(jax.tree.map(lambda x: jnp.moveaxis(x, 1, 2), codes)), 1, 2)
