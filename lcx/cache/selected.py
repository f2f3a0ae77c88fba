"""Pages of a KV cache's slots: what a selector is told of them, and the slots of those that it chooses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import tokens_of
from lcx.batch import PADDING, TokenInfo
from lcx.cache.kv_state import Held, hidden
from lcx.cache.layered import rows_from, rows_of
from lcx.cache.selectors.selector import Selector
from lcx.record import replaced
from pallas_kernels.tile_attention.tokens import Mask


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


def summarised(
    cache: Any,
    held: Held,
    tables: Any,
    frequencies: Any,
    place: Int[Array, "B K n"] | None = None,
    layer: Int[Array, ""] | None = None,
) -> Held:
    """With what the selector is told of some pages made anew, of all if there is no `place`. layer: of slots of all layers, the
    one meant."""
    selector: Selector = cache.selector
    codes, info, P = held.k, held.info, held.info.segments.shape[-1] // selector.page
    if place is not None:
        place, first = jnp.minimum(place, P - 1), 0 if layer is None else layer * len(place)
        codes, info = of_pages(rows_of((codes, info)) if layer is not None else (codes, info), place, P, first)
    B, K = jax.tree.leaves(codes)[0].shape[:2]
    keys = cache.turned_slots(cache.coders[0].decode(codes, tables[0]), info, frequencies)
    n = keys.shape[2] // selector.page
    there = jnp.broadcast_to(paged(info.segments != PADDING, n), (B, K, n, selector.page))
    new = selector.summarise(paged(keys, n), there)
    if place is None:
        return dataclasses.replace(held, pages=new)
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    at = (rows, heads, place) if layer is None else (layer, rows, heads, place)
    put = lambda old, some: old.at[at].set(some)
    return replaced(held, pages=jax.tree.map(put, held.pages, new))


def selected(
    selector: Selector,
    q: Float[Array, "B 1 H D"],
    q_info: TokenInfo,
    mask: Mask,
    summaries: Any,
    coded: Any,
    info: TokenInfo,
    axes: tuple[str, ...] = (),
    first: Int[Array, ""] | int = 0,
) -> tuple[Any, TokenInfo]:
    """(coded, info) of the slots that the query of each row is to read, of each key head its own; of the rest nothing is there.

    axes: of the mesh, over which slots are shared out. first: the row of `coded` and `info` that is row 0 of the queries.
    """
    (B, _, H, D), K = q.shape, jax.tree.leaves(summaries)[0].shape[1]
    P, every = info.segments.shape[2] // selector.page, info
    info = rows_from(info, first, B)
    rows = jax.tree.map(lambda x: x[:, None, :, None], tokens_of(q_info))
    columns = jax.tree.map(lambda x: x[:, :, None, :], tokens_of(info))
    seen = (mask.visible(rows, columns) & (columns.segments != PADDING))[:, :, 0]
    index = jnp.where(seen, info.index, -1)
    last = index.max(axis=2, keepdims=True)
    last = jax.lax.pmax(last, axes) if axes else last
    by_page: Any = lambda x: paged(x, P).any(axis=3)
    newest: Bool[Array, "B G P"] = by_page(seen & (index == last))
    place, read = selector.chosen(q.reshape(B, K, H // K, D), summaries, by_page(seen), newest, axes)
    coded, info = of_pages((coded, every), place, P, first)
    return coded, hidden(info, jnp.repeat(read, selector.page, axis=2))
