"""Pages of a KV cache's slots: those that are worth most to the query of a token are read, the rest is not.

A page is `page` slots side by side. When tokens are written their pages are summarised; a query scores summaries, and meets the
slots of the best pages alone: a key head's queries the same ones. Passes of several tokens read all.
"""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import tokens_of
from lcx.batch import PADDING
from lcx.cache.kv_state import hidden
from lcx.cache.layered import rows_from, rows_of
from lcx.cache.selectors.selector import Selector
from lcx.record import replaced


def paged(x: Array, pages: int) -> Array:
    """[B, K, in proportion to the slots, ...] as [B, K, pages, a page's, ...]."""
    return x.reshape(*x.shape[:2], pages, x.shape[2] // pages, *x.shape[3:])


def of_pages(tree: Any, place: Int[Array, "B K n"], pages: int, first: Int[Array, ""] | int = 0) -> Any:
    """Arrays of the slots of n pages alone; those that all key heads share, [B, 1, ...], for each. first: the row of all
    arrays that is row 0 of `place`."""
    row, head = first + jnp.arange(len(place))[:, None, None], jnp.arange(place.shape[1])[:, None]

    def some(x):
        x = paged(x, pages)
        found = x[row, head if x.shape[1] > 1 else 0, place]
        return found.reshape(*place.shape[:2], -1, *x.shape[4:])

    return jax.tree.map(some, tree)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pages(Selector):
    """Base of selectors that score pages. budget: slots that a query reads at most, in whole pages. group: what the queries of
    a key head are to a page, the sum of their scores or the largest."""

    page: int = 32
    budget: int
    group: Literal["sum", "max"] = "max"
    dense_layers: int = 2

    def validate(self):
        super().validate()
        self.check(self.budget >= self.page, "budget", f"at least a page of {self.page} slots")

    @property
    def pages(self) -> int:
        """That a query reads."""
        return self.budget // self.page

    @abc.abstractmethod
    def summarise(self, k: Float[Array, "B K P page D"], there: Bool[Array, "B K P page"]) -> Any:
        """Arrays [B, K, P, ...] of pages of rotated keys; what is not there is anything."""

    @abc.abstractmethod
    def score(self, q: Float[Array, "B K g D"], summaries: Any) -> Float[Array, "B K g P"]:
        """Larger for pages to read rather; of a page with nothing, anything."""

    def told(self, cache, held, tables, frequencies, place=None, layer=None):
        codes, info, P = held.k, held.info, held.info.segments.shape[-1] // self.page
        if place is not None:
            place, first = jnp.minimum(place, P - 1), 0 if layer is None else layer * len(place)
            codes, info = of_pages((codes, info) if layer is None else rows_of((codes, info)), place, P, first)
        B, K = jax.tree.leaves(codes)[0].shape[:2]
        keys = cache.turned_slots(cache.coders[0].decode(codes, tables[0]), info, frequencies)
        n = keys.shape[2] // self.page
        there = jnp.broadcast_to(paged(info.segments != PADDING, n), (B, K, n, self.page))
        new = self.summarise(paged(keys, n), there)
        if place is None:
            return dataclasses.replace(held, pages=new)
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
        at = (rows, heads, place) if layer is None else (layer, rows, heads, place)
        put = lambda old, some: old.at[at].set(some)
        return replaced(held, pages=jax.tree.map(put, held.pages, new))

    def found(self, find, q, q_info, rule, told, coded, info, axes=(), first=0):
        (B, _, H, D), K = q.shape, jax.tree.leaves(told)[0].shape[1]
        P, every = info.segments.shape[2] // self.page, info
        info = rows_from(info, first, B)
        rows = jax.tree.map(lambda x: x[:, None, :, None], tokens_of(q_info))
        columns = jax.tree.map(lambda x: x[:, :, None, :], tokens_of(info))
        seen = (rule.mask.visible(rows, columns) & (columns.segments != PADDING))[:, :, 0]
        index = jnp.where(seen, info.index, -1)
        last = index.max(axis=2, keepdims=True)
        last = jax.lax.pmax(last, axes) if axes else last
        by_page: Any = lambda x: paged(x, P).any(axis=3)
        newest: Bool[Array, "B G P"] = by_page(seen & (index == last))
        place, read = self.chosen(q.reshape(B, K, H // K, D), told, by_page(seen), newest, axes)
        coded, info = of_pages((coded, every), place, P, first)
        return find(coded, hidden(info, jnp.repeat(read, self.page, axis=2)))

    def chosen(
        self,
        q: Float[Array, "B K g D"],
        summaries: Any,
        seen: Bool[Array, "B G P"],
        newest: Bool[Array, "B G P"],
        axes: tuple[str, ...] = (),
    ) -> tuple[Any, Bool[Array, "B K n"]]:
        """(pages [B, K, n], which of them are read), n `pages` or all of them.

        seen: whether the query sees a token of a page; no other is read. newest: the page that is, whatever its score. axes: of
        the mesh, over whose devices pages are shared out, `pages` of all of them.
        """
        scores = self.score(q.astype(jnp.float32), summaries)
        scores = scores.sum(axis=2) if self.group == "sum" else scores.max(axis=2)
        scores = jnp.where(seen, jnp.where(newest, jnp.inf, scores), -jnp.inf)
        best, page = jax.lax.top_k(scores, min(self.pages, scores.shape[2]))
        read = best > -jnp.inf
        if axes:  # of pages that are worth as much the first, as on one device
            every = jax.lax.all_gather(best, axes, axis=2, tiled=True)
            first = jax.lax.top_k(every, min(self.pages, every.shape[2]))[1]
            own = jax.lax.axis_index(axes) * best.shape[2] + jnp.arange(best.shape[2])
            read = read & (own[:, None] == first[..., None, :]).any(axis=3)
        return page, read
