"""The paged cache: keys and values of all rows in one pool of pages, so that rows of other lengths share the memory.

A row takes a page when its tokens need one; who seats rows gives back those of a row that has ended (PagedAttention, Kwon et
al. 2023). Attention gathers the pages of each row, a span of slots at a time, and merges what it finds. No gradient.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from lcx.attention.all_gather import AllGather
from lcx.attention.merge import merge
from lcx.attention.sharded import sharded_attend
from lcx.attention.split_keys import split_axes
from lcx.cache.cache import At, KeysCache
from lcx.cache.kv_state import no_tokens, rounded_up
from lcx.cache.pages import PagedState
from lcx.cache.spans import SPAN
from lcx.parallel.gathered import axes_size
from lcx.parallel.rules import Rules, shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedCache(KeysCache):
    """page: tokens of one. pages: of the pool; None is as many as all rows can fill. keys: whether slots hold rotated or raw
    keys."""

    page: int = 64
    pages: int | None = None

    def validate(self):
        self.check(self.page >= 1, "page", "at least 1 token")
        self.check(self.pages is None or self.pages >= 1, "pages", "at least 1, or None for as many as all rows can fill")

    @property
    def exact(self):
        return True

    def fits(self, lengths: Sequence[int]) -> bool:
        return self.pages is None or sum(-(-length // self.page) for length in lengths) <= self.pages

    def init(self, batch_size, length, kv_heads, head_dim, value_dim, dtype, axes=1, at=At()):
        each = -(-length // self.page)
        pool = batch_size * each if self.pages is None else min(self.pages, batch_size * each)
        if each > (span := self._span):
            each = rounded_up(each, span)
        empty = lambda channels: jnp.zeros((pool, self.page, kv_heads, channels), dtype)
        zero = jnp.zeros(batch_size, jnp.int32)
        return PagedState(
            length=length,
            k=empty(head_dim),
            v=empty(value_dim),
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
        return state.put(self.held(k, info, frequencies), v, info.filled(), by_length)

    def read(self, state, frequencies):
        k, v, info = state.gathered(0, state.table.shape[1])
        return self.turned(k, info, frequencies), v, info

    def placed(self, state, rules):
        """Raises ValueError where rows or slots are shared out: rows draw on one pool."""
        if axes_size(rules.batch) > 1 or split_axes(rules):
            raise ValueError(
                "cache: rows or slots shared out over devices: expected another than a PagedCache, which has one pool"
            )
        pool = lambda x: shard(x, rules, None, None, "kv_heads", None)
        return dataclasses.replace(state, k=pool(state.k), v=pool(state.v))

    def attend(self, state, q, q_info, *, frequencies, rules=Rules(), **options):
        whole = dataclasses.replace(rules, sequence=())

        def part(first, pages: int):
            k, v, info = state.gathered(first, pages)
            k = self.turned(k, info, frequencies)
            return sharded_attend(q, k, v, q_info, info, rules=whole, communication=AllGather(), **options)

        pages, span = state.table.shape[1], self._span
        if pages <= span:
            return part(0, pages)
        turns = -(-state.used.max(initial=0) // (span * self.page))
        nothing = jnp.zeros((*q.shape[:3], state.v.shape[3])), jnp.full(q.shape[:3], -jnp.inf)
        return jax.lax.fori_loop(0, turns, lambda n, found: merge(found, part(n * span, span)), nothing)

    @property
    def _span(self) -> int:
        """Pages that are gathered at a time."""
        return max(SPAN // self.page, 1)

    @classmethod
    def examples(cls):
        return (cls(page=3, keys="raw"),)
