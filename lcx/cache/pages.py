"""Pages of keys and values that rows draw on as they grow, and give back (PagedAttention, Kwon et al. 2023).

What tokens are (their `TokenInfo`) stays by row: it is small, and what a page holds is read through its row alone.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lcx.batch import PADDING, TokenInfo
from lcx.cache.cache import Pooled
from lcx.cache.dense import grown
from lcx.cache.store import put, putting
from lcx.record import record, static


@record
class PagedState(Pooled):
    """length: tokens a row that it was made for. k, v: the pool, codes of tokens [P, page, K, ...]. table: the pages of each
    row in their order, P where there is none. info: of each row's slots (segment 0: empty). used: slots a row. free: numbers
    of pages that nobody holds, the first `left` of them. overflow: tokens that found no slot."""

    remedy: ClassVar[str] = "a larger PagedCache.pages, or fewer and shorter rows"

    length: int = static()
    k: Any
    v: Any
    table: Int[Array, "B N"]
    info: TokenInfo
    used: Int[Array, "B"]
    free: Int[Array, "P"]
    left: Int[Array, "1"]
    overflow: Int[Array, "B"]

    @property
    def page(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[1]

    def extended(self, count: Int[Array, "B"], most: int) -> "PagedState":
        """With room for `count` tokens more in each row, `most` at most; rows are served in their order."""
        pages, steps = len(self.free), jnp.arange(-(-most // self.page))
        behind = jnp.minimum(self.used + count, self.length)
        had = -(-self.used // self.page)
        need = -(-behind // self.page) - had
        rank = jnp.cumsum(need)[:, None] - need[:, None] + steps
        there = (steps < need[:, None]) & (rank < self.left)
        number = jnp.where(there, self.free[jnp.maximum(self.left - 1 - rank, 0)], pages)
        row = jnp.arange(len(need))[:, None]
        place = jnp.where(there, had[:, None] + steps, self.table.shape[1])
        table = self.table.at[row, place].set(number, mode="drop")
        return dataclasses.replace(self, table=table, left=jnp.maximum(self.left - need.sum(), 0))

    def put(self, k: Any, v: Any, info: TokenInfo, by_length: bool) -> "PagedState":
        """With the tokens of a pass that are no padding, coded [B, T, K, ...], behind those of each row."""
        real = info.segments != PADDING
        count = real.sum(axis=1)
        state = self.extended(count, real.shape[1])
        slot = state.used[:, None] + jnp.cumsum(real, axis=1) - 1
        numbers = jnp.take_along_axis(state.table, jnp.minimum(slot // state.page, state.table.shape[1] - 1), axis=1)
        fits = real & (slot < state.length) & (numbers < len(state.free))
        number, place = jnp.where(fits, numbers, len(state.free)), jnp.where(fits, slot % state.page, state.page)
        row = jnp.arange(len(slot))[:, None]
        slot = jnp.where(fits, slot, state.info.segments.shape[1])
        infos = jax.tree.map(lambda old, new: put(old, new.astype(old.dtype), row, slot), state.info, info)
        write = lambda old, new: putting(real.shape[1])(old, new.astype(old.dtype), number, place)
        return dataclasses.replace(
            state,
            k=jax.tree.map(write, state.k, k),
            v=jax.tree.map(write, state.v, v),
            info=grown(infos, info) if by_length else infos,
            used=jnp.minimum(state.used + count, state.length),
            overflow=state.overflow + (real & ~fits).sum(axis=1),
        )

    def gathered(self, first: Int[Array, ""] | int, pages: int) -> tuple[Any, Any, TokenInfo]:
        """The slots [B, n, K, ...] of some pages of every row, zero where there is no token: a page holds what others left."""
        size = pages * self.page
        table = jax.lax.dynamic_slice_in_dim(self.table, first, pages, axis=1)
        info = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first * self.page, size, axis=1), self.info)

        def rows(x):
            x = x.at[table].get(mode="fill", fill_value=0).reshape(len(table), size, *x.shape[2:])
            return jnp.where((info.segments != PADDING).reshape(len(table), size, *(1,) * (x.ndim - 2)), x, jnp.zeros_like(x))

        return jax.tree.map(rows, self.k), jax.tree.map(rows, self.v), info

    def released(self, rows):
        pages = len(self.free)
        gone = (self.table < pages) & rows[:, None]
        place = jnp.where(gone, self.left + jnp.cumsum(gone).reshape(gone.shape) - 1, pages)
        segments = jnp.where(rows[:, None], PADDING, self.info.segments)
        return dataclasses.replace(
            self,
            table=jnp.where(rows[:, None], pages, self.table),
            info=dataclasses.replace(self.info, segments=segments),
            used=jnp.where(rows, 0, self.used),
            free=self.free.at[place.reshape(-1)].set(self.table.reshape(-1), mode="drop"),
            left=self.left + gone.sum(),
            overflow=jnp.where(rows, 0, self.overflow),
        )

    def seated(self, alone, row):
        here: Bool[Array, "B"] = jnp.arange(len(self.used)) == row
        state = self.released(here).extended(jnp.where(here, alone.used[0], 0), alone.length)
        number, given = state.table[row], alone.table[0]
        number = jnp.where(given < len(alone.free), number, len(state.free))
        copied = lambda old, new: old.at[number].set(new.at[given].get(mode="fill", fill_value=0), mode="drop")
        rows = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new[:1].astype(old.dtype), row, axis=0)
        lost = (number == len(state.free)) & (given < len(alone.free))
        return dataclasses.replace(
            state,
            k=jax.tree.map(copied, state.k, alone.k),
            v=jax.tree.map(copied, state.v, alone.v),
            info=jax.tree.map(rows, state.info, alone.info),
            used=rows(state.used, alone.used),
            overflow=rows(state.overflow, alone.overflow + lost.sum() * self.page),
        )
