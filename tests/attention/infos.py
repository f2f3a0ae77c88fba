"""Token infos for tests: documents, padding, shared and reader segments, roles, and arrays in any order."""

import jax.numpy as jnp
import numpy as np

from lcx.batch import TokenInfo


def info(index, segments, order=None, roles=None) -> TokenInfo:
    index, segments = np.asarray(index, np.int32), np.asarray(segments, np.int32)
    order = index if order is None else np.asarray(order, np.int32)
    as_array = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
    return TokenInfo(
        index=as_array(index),
        order=as_array(order),
        positions=jnp.asarray(index[..., None], jnp.float32),
        segments=as_array(segments),
        roles=as_array(roles),
    )


def random_info(rng, rows, length, kind="packed") -> TokenInfo:
    """`documents`: causal text; `packed`: and padding; `special`: shared, readers, roles too; `mixed`: arrays in any order."""
    low = {"documents": 1, "packed": 0}.get(kind, -2)
    segments = np.sort(rng.integers(low, 4, (rows, length)), axis=1)
    index = np.zeros_like(segments)
    for row, own in zip(index, segments, strict=True):
        for segment in set(own) - {0}:
            row[own == segment] = np.arange((own == segment).sum())
    order, roles = index.copy(), rng.integers(0, 2, index.shape) if low < 0 else None
    if kind == "mixed":
        order = np.where(rng.random((rows, 1)) < 0.5, 0, order // 3)
        shuffle = np.argsort(rng.random(index.shape), axis=1)
        index, order, segments, roles = (np.take_along_axis(x, shuffle, 1) for x in (index, order, segments, roles))
    return info(index, segments, order, roles)
