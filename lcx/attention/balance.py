"""How evenly attention is spread over the devices that share a sequence, counted in visible pairs."""

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from lcx.attention.count import plain, spans, visible_pairs
from lcx.attention.mask import Mask, tokens_of
from lcx.batch import TokenInfo
from pallas_kernels.tile_attention.tokens import Tokens


@dataclasses.dataclass(frozen=True)
class Balance:
    """Largest over mean, 1 is even. devices: of the whole work. steps: of a ring, in which the slowest of each step counts."""

    devices: float
    steps: float


def shard_pairs(mask: Mask, info: TokenInfo, shards: int) -> Int[np.ndarray, "W W"]:
    """Visible pairs of the queries of each device with the keys of each, all rows together; columns lie in equal runs."""
    return sum(
        _row_pairs(mask, jax.tree.map(lambda x, row=row: x[row : row + 1], info), shards) for row in range(info.shape[0])
    )


def _row_pairs(mask: Mask, info: TokenInfo, shards: int) -> Int[np.ndarray, "W W"]:
    tokens = Tokens(*(np.asarray(field)[0] for field in tokens_of(info)))
    found = spans(mask, tokens.index.astype(np.int64)) if plain(tokens, tokens) else None
    size = info.shape[1] // shards
    if found is None:
        parts = [info.take(slice(i * size, (i + 1) * size)) for i in range(shards)]
        return np.asarray([[visible_pairs(mask, q, k).sum() for k in parts] for q in parts])
    document = tokens.segments.astype(np.int64) << 32
    real = tokens.segments != 0
    pairs = []
    for keys in (document + tokens.index).reshape(shards, size):
        keys = np.sort(keys[keys >= 1 << 32])  # without padding
        seen = sum(np.searchsorted(keys, document + high) - np.searchsorted(keys, document + low) for low, high in found)
        pairs.append(np.where(real, seen, 0).reshape(shards, size).sum(axis=1))
    return np.stack(pairs, axis=1)


def balance(pairs: Int[np.ndarray, "W W"]) -> Balance:
    """Of `shard_pairs`. With nothing to see at all, both are 1."""
    shards = len(pairs)
    place = np.arange(shards)
    steps = np.stack([pairs[place, (place - hop) % shards] for hop in range(shards)])
    mean = pairs.sum() / shards
    if mean == 0:
        return Balance(1.0, 1.0)
    return Balance(float(pairs.sum(axis=1).max() / mean), float(steps.max(axis=1).sum() / mean))
