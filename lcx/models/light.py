"""A model for use: matrices that are multiplied in `compute` are held in it, half the bytes in bfloat16, and answers as before.

Modules name them in `CAST`; what is read in float32 (norms, biases, gates, states) stays in it. A model that learns while it is
used, or has a memory, is left as it is.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lcx.models.decoder import DecoderModel


def light(model: DecoderModel) -> DecoderModel:
    """The same model, of which `model` need not be kept. Sharded arrays stay where they are."""
    compute = jnp.dtype(model.spec.compute)
    if type(model) is not DecoderModel or model.spec.memory is not None:
        return model
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_graph(model):
        for name in getattr(module, "CAST", ()):
            held = getattr(module, name)
            if held is not None and held.get_value().dtype != compute:
                setattr(module, name, held.replace(_cast(held.get_value(), compute)))
    return model


def _cast(x: jax.Array | jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)
    return x.astype(dtype)
