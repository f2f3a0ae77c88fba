"""Which pairs of channels carry a model's attention: what DPE (Lu et al. 2025) regroups, the others keep their positions.

A pair counts by the mean over tokens of the length of a query's pair times that of the same token's key's, before rotation.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from lcx.batch import Batch
from lcx.evaluation.raw_heads import raw_heads
from lcx.models.decoder import DecoderModel


def key_dimensions(model: DecoderModel, batches: Iterable[Batch], count: int) -> Bool[np.ndarray, "L H C"]:
    """The `count` pairs of each layer and query head that count most, over batches of text, for `DimensionGroups.dimensions`.

    Raises ValueError if heads have not as many pairs, or a layer is not read by `raw_heads`.
    """
    total = sum(np.asarray(_lengths(model, batch)) for batch in batches)
    if not 1 <= count <= total.shape[-1]:
        raise ValueError(f"key_dimensions: count = {count}: expected from 1 to the {total.shape[-1]} pairs of a head")
    rank = np.argsort(np.argsort(-total, axis=-1, kind="stable"), axis=-1)
    return rank < count


@jax.jit
def _lengths(model: DecoderModel, batch: Batch):
    """[L, H, C], the mean over tokens."""
    real = (jnp.asarray(batch.info.segments) != 0)[..., None, None]

    def of_layer(layer):
        q, k = raw_heads(model, batch, layer)
        pair = lambda x: jnp.hypot(*jnp.split(x, 2, axis=-1))
        product = pair(q) * jnp.repeat(pair(k), q.shape[2] // k.shape[2], axis=2)
        return jnp.where(real, product, 0).sum(axis=(0, 1)) / real.sum()

    return jnp.stack([of_layer(layer) for layer in range(model.spec.depth)])
