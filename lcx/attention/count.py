"""The exact number of visible pairs of a mask over given tokens, on the host: the FLOPs of attention stand on it.

Ordinary causal documents are counted in closed form, O(T) a row; anything else (roles, shared segments, unusual order)
tile by tile, where only partial tiles are looked at pair by pair.
"""

import numpy as np

from lcx.attention.mask import FAR, Mask, tokens_of
from lcx.batch import TokenInfo
from pallas_kernels.tile_attention.tokens import Tokens, pad_tokens, tiles


def visible_pairs(mask: Mask, q_info: TokenInfo, k_info: TokenInfo) -> np.ndarray:
    """Visible (query, key) pairs of each row: i64[B]."""
    q, k = (Tokens(*map(np.asarray, tokens_of(info))) for info in (q_info, k_info))
    rows = []
    for b in range(q.index.shape[0]):
        q_row, k_row = (Tokens(*(field[b] for field in side)) for side in (q, k))
        rows.append(_count_documents(mask, q_row, k_row) if plain(q_row, k_row) else _count_tiles(mask, q_row, k_row))
    return np.asarray(rows, np.int64)


def document_pairs(mask: Mask, length: int) -> int:
    """Visible pairs of one causal document of `length` tokens: what a plan or a FLOP estimate uses before data exist."""
    index = np.arange(length, dtype=np.int32)
    row = Tokens(index, index, np.ones_like(index), np.zeros_like(index))
    return int(_count_documents(mask, row, row) if mask.intervals(index[:1].astype(np.int64)) else _count_tiles(mask, row, row))


def plain(q: Tokens, k: Tokens) -> bool:
    """Whether queries and keys are the same causal documents: order is the index, and each index stands once a segment."""
    if any(a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(q, k, strict=True)):
        return False
    real = q.segments != 0
    if (q.segments < 0).any() or not np.array_equal(q.order[real], q.index[real]):
        return False
    pairs = np.stack([q.segments[real], q.index[real]], axis=1)
    if len(pairs) == 0:
        return True
    ordered = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    starts = np.r_[True, ordered[1:, 0] != ordered[:-1, 0]]
    expected = np.arange(len(ordered)) - np.maximum.accumulate(np.where(starts, np.arange(len(ordered)), 0))
    return np.array_equal(ordered[:, 1], expected)


def spans(mask: Mask, index: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Disjoint half-open ranges of key indices that queries of causal documents see; None if the mask reads more than indices.

    index: i64[n], of the queries.
    """
    intervals = mask.intervals(index)
    if intervals is None:
        return None
    lows = np.stack([np.clip(low, 0, index + 1) for low, _ in intervals])
    highs = np.stack([np.clip(high, 0, index + 1) for _, high in intervals])
    order = np.argsort(lows, axis=0, kind="stable")
    lows, highs = np.take_along_axis(lows, order, 0), np.take_along_axis(highs, order, 0)
    found, reached = [], np.full_like(index, -FAR)
    for low, high in zip(lows, highs, strict=True):
        low = np.maximum(low, reached)
        found.append((low, np.maximum(low, high)))
        reached = np.maximum(reached, high)
    return found


def _count_documents(mask: Mask, q: Tokens, k: Tokens) -> int:
    found = spans(mask, q.index[q.segments != 0].astype(np.int64))
    return _count_tiles(mask, q, k) if found is None else int(sum((high - low).sum() for low, high in found))


def _count_tiles(mask: Mask, q: Tokens, k: Tokens, size: int = 256) -> int:
    q, k = (Tokens(*map(np.asarray, pad_tokens(side, size))) for side in (q, k))
    may, must = map(np.asarray, mask.bounds(tiles(q, size).rows(), tiles(k, size).columns()))
    total = int(must.sum()) * size * size
    for i, j in np.argwhere(may & ~must):
        q_tile = Tokens(*(field[i * size : (i + 1) * size] for field in q))
        k_tile = Tokens(*(field[j * size : (j + 1) * size] for field in k))
        total += int(np.sum(mask.visible(q_tile.rows(), k_tile.columns())))
    return total
