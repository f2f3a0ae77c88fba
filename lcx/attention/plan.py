"""Block plans: which tiles of pairs, and which single keys, are worth attending to. What a selector returns.

A plan restricts attention, it never widens it: pairs count that the mask lets through and that the plan lists, in a tile or as
a column, once however often it lists them. Tiles are `block` = (query, key) tokens of the arrays, in their order; the last of
an axis may be short, since a plan is for arrays of `lengths` = (T, S) tokens and no others. A plan is shared by all heads
(G = 1), or stands for each key head (G = K) or query head (G = H).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int8, Int32

from lcx.attention.mask import Mask, tokens_of
from lcx.batch import TokenInfo
from lcx.record import record, static
from pallas_kernels.tile_attention.tile_list import TileList, kinds
from pallas_kernels.tile_attention.tiling import EMPTY
from pallas_kernels.tile_attention.tokens import pad_tokens, tiles

NEVER = np.iinfo(np.int32).max


@record
class BlockPlan:
    """rows, cols: query and key tiles, sorted by row; the first `count` places of A count. kind: FULL, PARTIAL or EMPTY (skip).

    Kinds are hints: FULL promises that every pair of a tile is visible, and is checked against the mask's bounds, as PARTIAL
    is; a tile that is not surely full is masked pair by pair. columns: single keys by their place in the array, for all queries
    of a block, the first `column_count` of C. overflow: tiles and columns that found no place. Attention over a plan that
    overflows leaves them out: whoever makes plans checks it, as with a cache's.
    """

    rows: Int32[Array, "B G A"]
    cols: Int32[Array, "B G A"]
    kind: Int8[Array, "B G A"]
    count: Int32[Array, "B G"]
    overflow: Int32[Array, "B G"]
    columns: Int32[Array, "B G Q C"] | None = None
    column_count: Int32[Array, "B G Q"] | None = None
    block: tuple[int, int] = static()
    lengths: tuple[int, int] = static()

    @property
    def tiles(self) -> TileList:
        return TileList(self.rows, self.cols, self.kind, self.count)


def dense_plan(
    mask: Mask, q_info: TokenInfo, k_info: TokenInfo, *, block: tuple[int, int], most: int | None = None
) -> BlockPlan:
    """Every tile that the mask does not make empty, in places for `most` tiles (None: for all); the last ones overflow.

    Raises ValueError unless a block has tokens on both sides.
    """
    if min(block) < 1:
        raise ValueError(f"dense_plan: block = {block}: expected at least 1 token a side")
    q, k = (tiles(pad_tokens(tokens_of(info), size), size) for info, size in zip((q_info, k_info), block, strict=True))
    kind = kinds(*mask.bounds(q.rows(), k.columns()))
    (nq, nk), kind = kind.shape[1:], kind.reshape(kind.shape[0], 1, -1)
    listed = (kind != EMPTY).sum(axis=-1, dtype=jnp.int32)
    most = nq * nk if most is None else most
    place = jnp.argsort(kind == EMPTY, axis=-1, stable=True)[..., :most].astype(jnp.int32)
    return BlockPlan(
        rows=place // nk,
        cols=place % nk,
        kind=jnp.take_along_axis(kind, place, axis=-1).astype(jnp.int8),
        count=jnp.minimum(listed, most),
        overflow=jnp.maximum(listed - most, 0),
        block=block,
        lengths=(q_info.index.shape[-1], k_info.index.shape[-1]),
    )


def transpose(plan: BlockPlan) -> BlockPlan:
    """The plan of keys by queries. Raises ValueError if it has columns, which are lists of a query block's keys."""
    if plan.columns is not None:
        raise ValueError(f"transpose: a plan with columns {plan.columns.shape}: expected tiles alone")
    behind = jnp.arange(plan.rows.shape[-1]) >= plan.count[..., None]
    order = jnp.lexsort((plan.rows, plan.cols, behind), axis=-1)
    rows, cols, kind = (jnp.take_along_axis(x, order, axis=-1) for x in (plan.cols, plan.rows, plan.kind))
    turned = {"block": plan.block[::-1], "lengths": plan.lengths[::-1]}
    return BlockPlan(rows=rows, cols=cols, kind=kind, count=plan.count, overflow=plan.overflow, **turned)


def check_plan(plan: BlockPlan, B: int, T: int, S: int, H: int, K: int) -> None:
    """Raises ValueError if a plan is not one for B rows of T queries and S keys, H query and K key heads, or disagrees with
    itself."""
    if not isinstance(plan, BlockPlan):
        raise ValueError(f"plan = {plan!r}: expected a BlockPlan, or None")
    rows, groups, _ = plan.rows.shape
    if rows != B or groups not in (1, K, H):
        raise ValueError(f"plan: {rows} rows and {groups} groups: expected {B} rows and 1, {K} or {H} groups")
    if min(plan.block) < 1:
        raise ValueError(f"plan: block = {plan.block}: expected at least 1 token a side")
    if plan.lengths != (T, S):
        raise ValueError(f"plan: made for lengths = {plan.lengths} of queries and keys: expected those of q and k, {(T, S)}")
    blocks = -(-T // plan.block[0])
    if plan.columns is not None and (plan.column_count is None or plan.columns.shape[2] != blocks):
        raise ValueError(f"plan: columns of {plan.columns.shape[2]} query blocks: expected {blocks}, and their count")
    lists, counts = plan.rows.shape, plan.rows.shape[:2]
    expected = {"cols": lists, "kind": lists, "count": counts, "overflow": counts}
    if plan.columns is not None:
        expected |= {"columns": (*counts, blocks, plan.columns.shape[3]), "column_count": (*counts, blocks)}
    for name, shape in expected.items():
        if getattr(plan, name).shape != shape:
            raise ValueError(f"plan: {name} {getattr(plan, name).shape}: expected {shape}, as rows {lists} have it")


def allowed(plan: BlockPlan) -> Bool[Array, "B G T S"]:
    """The pairs that a plan lists, as an array: for the reference alone."""
    (T, S), (bq, bk) = plan.lengths, plan.block
    nq, nk = -(-T // bq), -(-S // bk)
    B, G, A = plan.rows.shape
    b, g = jnp.arange(B)[:, None, None], jnp.arange(G)[:, None]
    real = (jnp.arange(A) < plan.count[..., None]) & (plan.kind != EMPTY) & (plan.rows >= 0) & (plan.cols >= 0)
    listed = jnp.zeros((B, G, nq, nk), bool).at[b, g, jnp.where(real, plan.rows, nq), plan.cols].set(True, mode="drop")
    pairs = jnp.repeat(jnp.repeat(listed, bq, axis=2), bk, axis=3)[:, :, :T, :S]
    if plan.columns is None:
        return pairs
    real = (jnp.arange(plan.columns.shape[-1]) < plan.column_count[..., None]) & (plan.columns >= 0)
    at = b[..., None], g[..., None], jnp.arange(nq)[:, None], jnp.where(real, plan.columns, S)
    single = jnp.zeros((B, G, nq, S), bool).at[at].set(True, mode="drop")
    return pairs | jnp.repeat(single, bq, axis=2)[:, :, :T]


def lone_columns(plan: BlockPlan, listed: TileList) -> tuple[Int32[Array, "B G Q C"], Bool[Array, "B G Q C"]]:
    """The columns of each query block in their order, and whether one counts: once, inside the array, in no tile of its row.

    listed: the plan's tiles as `verified` gives them.
    """
    (Q, C), S = plan.columns.shape[2:], plan.lengths[1]
    nk = -(-S // plan.block[1])
    inside = (jnp.arange(C) < plan.column_count[..., None]) & (plan.columns >= 0) & (plan.columns < S)
    column = jnp.sort(jnp.where(inside, plan.columns, NEVER), axis=-1)
    again = jnp.pad(column[..., 1:] == column[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    real = jnp.arange(listed.rows.shape[-1]) < listed.count[..., None]
    tile = jnp.pad(jnp.where(real, listed.rows * nk + listed.cols, NEVER), [(0, 0)] * 2 + [(0, 1)], constant_values=NEVER)
    own = jnp.arange(Q, dtype=jnp.int32)[:, None] * nk + jnp.minimum(column, S - 1) // plan.block[1]
    find = lambda line, wanted: line[jnp.searchsorted(line, wanted)] == wanted
    covered = jax.vmap(jax.vmap(find))(tile, own)
    return jnp.minimum(column, S - 1), (column != NEVER) & ~again & ~covered
