"""A tiny model and batch for the training tests."""

import jax
import numpy as np
import pytest

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    layer = Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=4), channel=GLU(hidden=16))
    return Decoder(vocab=32, width=8, pattern=(layer,), periods=2)


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Eight rows of 24 tokens, on the host: several documents, padding on both sides, unequal loss weights."""
    rng = np.random.default_rng(0)
    rows = [[1] * 9 + [2] * 15, [1] * 24, [0] * 3 + [1] * 21, [1] * 2 + [2] * 3 + [3] * 16 + [0] * 3]
    segments = np.asarray(rows * 2, np.int32)
    tokens, targets = rng.integers(0, 32, (2, 8, 24)).astype(np.int32)
    weights = (segments > 0) * rng.choice([0.0, 1.0, 2.0], segments.shape)
    info = jax.tree.map(np.asarray, causal_info(segments))
    return Batch(tokens=tokens, targets=targets, loss_weights=weights.astype(np.float32), info=info)
