"""Cutting attention into tiles: sizes, tile-major arrays, and the loop that runs over the tiles that some pair can see.

Tile-major arrays carry [groups, tiles, R, ...]: B rows are `groups` groups of R rows that share one list of tiles; a tile of
`size` tokens and the G query heads of one key head are one matrix of G * size rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.tile_attention.tokens import Mask, Tokens, tiles

ALIGN = 16  # tokens: a tile that does not span the whole array is a multiple of this
EMPTY, PARTIAL, FULL = 2, 1, 0


def tile_size(length: int, target: int) -> int:
    """Tokens of a tile: about `target`, with little padding; the whole length where one tile is enough."""
    count = -(-length // target)
    return length if count <= 1 else -(-length // (count * ALIGN)) * ALIGN


def cut(x: Shaped[Array, "B T heads *D"], size: int, rows: int, kv_heads: int) -> Shaped[Array, "groups n R K Gsize *D"]:
    """Tile-major form: [groups, tiles, R, K, G * size, ...], zeros appended up to whole tiles."""
    x = _pad(x, size)
    B, T, heads, *rest = x.shape
    G = heads // kv_heads
    x = x.reshape(B // rows, rows, T // size, size, kv_heads, G, *rest)
    x = x.transpose(0, 2, 1, 4, 5, 3, *range(6, x.ndim))
    return x.reshape(B // rows, T // size, rows, kv_heads, G * size, *rest)


def uncut(x: Shaped[Array, "groups n R K Gsize *D"], size: int, length: int) -> Shaped[Array, "B T heads *D"]:
    """Inverse of `cut`, without the appended zeros."""
    groups, n, rows, kv_heads, stacked, *rest = x.shape
    x = x.reshape(groups, n, rows, kv_heads, stacked // size, size, *rest)
    x = x.transpose(0, 2, 1, 5, 3, 4, *range(6, x.ndim))
    return x.reshape(groups * rows, n * size, kv_heads * (stacked // size), *rest)[:, :length]


def cut_tokens(tokens: Tokens, size: int, rows: int) -> Tokens:
    """Tile-major tokens: every field [groups, tiles, R, size], padding tokens appended up to whole tiles."""

    def one(field):
        field = _pad(field.astype(jnp.int32), size)
        B, T = field.shape
        return field.reshape(B // rows, rows, T // size, size).swapaxes(1, 2)

    return Tokens(*map(one, tokens))


def states(mask: Mask, q: Tokens, k: Tokens) -> Int[Array, "nq nk"]:
    """FULL, PARTIAL or EMPTY for every tile of one group, over all its rows; tokens [tiles, R, size]."""

    def statistics(tokens):
        size = tokens.index.shape[-1]
        return tiles(Tokens(*(field.swapaxes(0, 1).reshape(field.shape[1], -1) for field in tokens)), size)

    may, must = mask.bounds(statistics(q).rows(), statistics(k).columns())
    return jnp.where(must.all(axis=0), FULL, jnp.where(may.any(axis=0), PARTIAL, EMPTY)).astype(jnp.int32)


def over_tiles(state: Int[Array, "n"], step: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """`carry = step(i, masked, carry)` for every tile that is not empty: the full ones without a mask, then the partial."""
    if state.shape[0] == 1:
        return step(0, True, carry)
    order = jnp.argsort(state, stable=True)
    full, some = jnp.sum(state == FULL), jnp.sum(state != EMPTY)
    carry = jax.lax.fori_loop(0, full, lambda n, carry: step(order[n], False, carry), carry)
    return jax.lax.fori_loop(full, some, lambda n, carry: step(order[n], True, carry), carry)


def pick(tree: Any, i: Int[Array, ""] | int) -> Any:
    """Element i of the leading axis of every leaf."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), tree)


def _pad(x: Shaped[Array, "B T *rest"], size: int) -> Shaped[Array, "B n *rest"]:
    missing = -x.shape[1] % size
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x
