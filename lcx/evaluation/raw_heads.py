"""Queries and keys of a layer of a trained model before they are turned: what analyses of positions read."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.batch import Batch
from lcx.mixers.attention import AttentionModule
from lcx.models.decoder import DecoderModel
from lcx.models.residual import PreNorm


def raw_heads(model: DecoderModel, batch: Batch, layer: int) -> tuple[Float[Array, "B T H D"], Float[Array, "B T K D"]]:
    """(queries, keys) after their norms, float32.

    Raises ValueError unless the layer is pre-norm attention and begins a period.
    """
    if model.spec.memory is not None:
        raise ValueError(f"raw_heads: model.memory is {type(model.spec.memory).__name__}: expected None, with plain layers")
    slot, period = layer % len(model.slots), layer // len(model.slots)
    block = jax.tree.map(lambda p: p[period], model.slots[slot])
    known = type(block.mixer) is AttentionModule and isinstance(block.spec.residual, PreNorm)
    if slot or not known:
        raise ValueError(f"raw_heads: layer = {layer}: expected pre-norm attention, a multiple of {len(model.slots)}")
    h, mixer = block.norms[0](model(batch, upto=layer)[0]), block.mixer
    found = []
    for matrix, bias, norm in (
        (mixer.query, mixer.query_bias, mixer.query_norm),
        (mixer.key, mixer.key_bias, mixer.key_norm),
    ):
        x = jnp.einsum("btm,mhd->bthd", h.astype(jnp.float32), matrix[...], precision="highest")
        x = x if bias is None else x + bias[...]
        found.append(x if norm is None else norm(x))
    return tuple(found)
