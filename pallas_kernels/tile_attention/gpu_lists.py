"""What a program of a GPU kernel goes through: the tiles of one row of the major axis, those fully visible first.

A row's tiles stand one after the other in `minors`, from `ends[0]`; the first `ends[1]` of them are full, `ends[2]` are listed.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from pallas_kernels.tile_attention.blocks import Sizes
from pallas_kernels.tile_attention.tile_list import KINDS, TileList, tile_states
from pallas_kernels.tile_attention.tiling import EMPTY, FULL
from pallas_kernels.tile_attention.tokens import Mask

LONGEST = (1 << 31) - 1


class Lists(NamedTuple):
    """`groups` is 1, or K for one list a key head."""

    minors: Int32[Array, "B groups A"]
    ends: Int32[Array, "B groups majors 3"]


def of_queries(mask: Mask, size: Sizes, given: Mapping[str, Array], tiles: TileList | None) -> Lists:
    """Key tiles of every query tile: those of the list, or all in which some pair may be visible. Padded tokens are given."""
    if tiles is None:
        return from_states(_states(mask, size, given))
    return from_list(tiles, _places(size, given))


def of_keys(mask: Mask, size: Sizes, given: Mapping[str, Array], tiles: TileList | None) -> Lists:
    """Query tiles of every key tile."""
    if tiles is None:
        return from_states(_states(mask, size, given).swapaxes(1, 2))
    return from_list(tiles.transposed(), _places(size, given)[::-1])


def from_states(states: Int32[Array, "B majors minors"]) -> Lists:
    """The tiles that are not EMPTY. Raises ValueError where there are more than an int32 counts."""
    B, rows, minors = states.shape
    if rows * minors > LONGEST:
        raise ValueError(
            f"attend: {rows} x {minors} tiles on one device: expected at most 2^31 - 1; share rows among more devices"
        )
    order = jnp.sort(states * minors + jnp.arange(minors, dtype=jnp.int32), axis=-1) % minors
    starts = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32) * minors, (B, rows))
    counts = (states == FULL).sum(-1, dtype=jnp.int32), (states != EMPTY).sum(-1, dtype=jnp.int32)
    return Lists(order.reshape(B, 1, -1), jnp.stack([starts, *counts], axis=-1)[:, None])


def from_list(given: TileList, tiles: tuple[int, int]) -> Lists:
    """The tiles of a list that lie inside the arrays, which have so many tiles on its row and column axis."""
    majors, _ = tiles
    real = jnp.arange(given.rows.shape[-1]) < given.count[..., None]
    real &= (given.kind != EMPTY) & (given.rows < majors) & (given.cols < tiles[1])
    place = jnp.where(real, given.rows * KINDS + given.kind, majors * KINDS)
    place, minors = jax.lax.sort((place, given.cols), num_keys=2)
    bounds = jnp.arange(majors)[:, None] * KINDS + jnp.array([0, FULL + 1, KINDS])
    find = lambda sorted: jnp.searchsorted(sorted, bounds).astype(jnp.int32)
    start, full, end = jnp.moveaxis(jax.vmap(jax.vmap(find))(place), -1, 0)
    return Lists(minors, jnp.stack([start, full - start, end - start], axis=-1))


def split(tiles: TileList | None, rows: int, columns: int) -> TileList | None:
    """Each tile in as many parts, down and across."""
    if tiles is None or columns * rows == 1:
        return tiles
    times, part = columns * rows, jnp.arange(columns * rows, dtype=jnp.int32)
    cut = lambda x, parts, place: (x[..., None] * parts + place).reshape(*x.shape[:2], -1)
    return TileList(
        cut(tiles.rows, rows, part // columns),
        cut(tiles.cols, columns, part % columns),
        jnp.repeat(tiles.kind, times, axis=-1),
        tiles.count * times,
    )


def _places(size: Sizes, given: Mapping[str, Array]) -> tuple[int, int]:
    return given["q_tokens"].shape[2] // size.bq, given["k_tokens"].shape[2] // size.bk


def _states(mask: Mask, size: Sizes, given: Mapping[str, Array]) -> Int32[Array, "B nq nk"]:
    cut = lambda x, size: x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)
    return tile_states(mask, cut(given["q_tokens"], size.bq), cut(given["k_tokens"], size.bk))
