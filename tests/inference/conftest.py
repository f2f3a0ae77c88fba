"""One small model for the tests of inference, and its plain forward pass."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.mixers.short_convolution import ShortConvolution
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer


@pytest.fixture(scope="session")
def model():
    layer = Layer(mixer=Attention(heads=2, kv_heads=1, head_dim=8), channel=GLU(hidden=32))
    spec = Decoder(vocab=260, width=32, pattern=(layer,), periods=2, embed_mixer=ShortConvolution(), embed_scale=8.0)
    return spec.build(rngs=nnx.Rngs(0))


@pytest.fixture(scope="session")
def logits(model):
    """Of one row of at most 128 ids, `[T, V]`; one shape, so that it compiles once."""

    @jax.jit
    def padded(model, ids, segments):
        return model.logits(model(Batch(tokens=ids, info=causal_info(segments)))[0])

    def run(row):
        pad = lambda x: jnp.pad(jnp.asarray(x, jnp.int32), (0, 128 - len(row)))[None]
        return padded(model, pad(row), pad([1] * len(row)))[0, : len(row)]

    return run
