"""Spans of many slots are read each where it lies."""

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.attend import local_fold
from lcx.attention.mask import Causal
from lcx.batch import causal_info
from lcx.cache.spans import SPAN, Slots, attend_slots


def test_every_span_of_a_long_row_is_found():
    """Beyond 2^31 / slots too: each query finds the one token that is like it, whatever span holds it."""
    size = 66 * SPAN + 5
    places = np.asarray([3, 17 * SPAN + 1, 40 * SPAN + 9, 65 * SPAN + 2, size - 1])
    k, v = np.zeros((1, 1, size, 8), np.float32), np.arange(size, dtype=np.float32)[None, None, :, None]
    k[0, 0, places, np.arange(5)] = 40
    q = jnp.asarray(np.eye(5, 8, dtype=np.float32))[None, :, None]
    info = jax.tree.map(lambda x: x[:, None], causal_info(jnp.ones((1, size), jnp.int32)).filled())
    q_info = causal_info(jnp.ones((1, 5), jnp.int32), start=jnp.full(1, size)).filled()

    @jax.jit
    def found(q, k, v, info):
        fold = local_fold(q, k[:, 0, :, None], mask=Causal(), scale=1.0, heads=1, head_axes=(), backend="xla")
        read = lambda part: Slots(*part)
        sizes = {"size": size, "used": jnp.int32(size), "block": 1, "kv_heads": 1, "value_dim": 1}
        return attend_slots(fold, q, q_info, (k, v, info), read, **sizes)[0]

    np.testing.assert_allclose(found(q, jnp.asarray(k), jnp.asarray(v), info)[0, :, 0, 0], places, rtol=1e-5)
