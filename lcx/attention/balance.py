"""How evenly attention is spread over the devices that share a sequence, counted in visible pairs."""

import dataclasses

import numpy as np
from jaxtyping import Int

from lcx.attention.count import visible_pairs
from lcx.attention.mask import Mask
from lcx.batch import TokenInfo


@dataclasses.dataclass(frozen=True)
class Balance:
    """Largest over mean, 1 is even. devices: of the whole work. steps: of a ring, in which the slowest of each step counts."""

    devices: float
    steps: float


def shard_pairs(mask: Mask, info: TokenInfo, shards: int) -> Int[np.ndarray, "W W"]:
    """Visible pairs of the queries of each device with the keys of each, all rows together; columns lie in equal runs."""
    size = info.shape[1] // shards
    parts = [info.take(slice(i * size, (i + 1) * size)) for i in range(shards)]
    return np.asarray([[visible_pairs(mask, q, k).sum() for k in parts] for q in parts])


def balance(pairs: Int[np.ndarray, "W W"]) -> Balance:
    """Of `shard_pairs`. With nothing to see at all, both are 1."""
    shards = len(pairs)
    place = np.arange(shards)
    steps = np.stack([pairs[place, (place - hop) % shards] for hop in range(shards)])
    mean = pairs.sum() / shards
    if mean == 0:
        return Balance(1.0, 1.0)
    return Balance(float(pairs.sum(axis=1).max() / mean), float(steps.max(axis=1).sum() / mean))
