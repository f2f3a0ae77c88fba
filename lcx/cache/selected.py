"""Pages of a KV cache's slots: what a selector is told of them, and the slots of those that it chooses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import tokens_of
from lcx.batch import PADDING, TokenInfo
from lcx.cache.kv_state import Held, hidden
from lcx.cache.selectors.selector import Selector
from pallas_kernels.tile_attention.tokens import Mask


def paged(x: Array, pages: int) -> Array:
    """[B, K, in proportion to the slots, ...] as [B, K, pages, a page's, ...]."""
    return x.reshape(*x.shape[:2], pages, x.shape[2] // pages, *x.shape[3:])


def of_pages(tree: Any, place: Int[Array, "B K n"], pages: int) -> Any:
    """Arrays of the slots of n pages alone; those that all key heads share, [B, 1, ...], for each."""

    def some(x):
        x = paged(x, pages)
        x = jnp.broadcast_to(x, (x.shape[0], place.shape[1], *x.shape[2:]))
        found = jnp.take_along_axis(x, place.reshape(*place.shape, *(1,) * (x.ndim - 3)), axis=2)
        return found.reshape(*place.shape[:2], -1, *x.shape[4:])

    return jax.tree.map(some, tree)


def summarised(cache: Any, held: Held, tables: Any, frequencies: Any, place: Int[Array, "B K n"] | None = None) -> Held:
    """With what the selector is told of some pages made anew, of all if there is no `place`."""
    selector: Selector = cache.selector
    codes, info, (B, K) = held.k, held.info, jax.tree.leaves(held.k)[0].shape[:2]
    P = info.segments.shape[2] // selector.page
    if place is not None:
        place = jnp.minimum(place, P - 1)
        codes, info = of_pages((codes, info), place, P)
    keys = cache.turned_slots(cache.coders[0].decode(codes, tables[0]), info, frequencies)
    n = keys.shape[2] // selector.page
    there = jnp.broadcast_to(paged(info.segments != PADDING, n), (B, K, n, selector.page))
    new = selector.summarise(paged(keys, n), there)
    if place is None:
        return dataclasses.replace(held, pages=new)
    rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
    put = lambda old, some: old.at[rows, heads, place].set(some)
    return dataclasses.replace(held, pages=jax.tree.map(put, held.pages, new))


def selected(
    selector: Selector,
    q: Float[Array, "B 1 H D"],
    q_info: TokenInfo,
    mask: Mask,
    summaries: Any,
    coded: Any,
    info: TokenInfo,
    axes: tuple[str, ...] = (),
) -> tuple[Any, TokenInfo]:
    """(coded, info) of the slots that the query of each row is to read, of each key head its own; of the rest nothing is there.

    axes: of the mesh, over which slots are shared out.
    """
    (B, _, H, D), K = q.shape, jax.tree.leaves(summaries)[0].shape[1]
    P = info.segments.shape[2] // selector.page
    rows = jax.tree.map(lambda x: x[:, None, :, None], tokens_of(q_info))
    columns = jax.tree.map(lambda x: x[:, :, None, :], tokens_of(info))
    seen = (mask.visible(rows, columns) & (columns.segments != PADDING))[:, :, 0]
    index = jnp.where(seen, info.index, -1)
    last = index.max(axis=2, keepdims=True)
    last = jax.lax.pmax(last, axes) if axes else last
    by_page: Any = lambda x: paged(x, P).any(axis=3)
    newest: Bool[Array, "B G P"] = by_page(seen & (index == last))
    place, read = selector.chosen(q.reshape(B, K, H // K, D), summaries, by_page(seen), newest, axes)
    coded, info = of_pages((coded, info), place, P)
    return coded, hidden(info, jnp.repeat(read, selector.page, axis=2))
