"""Infini-attention gives what its equations give as written, in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from infini_attention import DIM, HEADS, LENGTH, ROWS, SEGMENT

from lcx.attention.mask import Chunk
from lcx.batch import Batch, causal_info
from lcx.mixers.attention import Attention
from lcx.mixers.infini_attention import InfiniAttention
from lcx.mixers.mixer import Inherited
from lcx.parallel.rules import Rules


@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_the_layer_equals_the_recurrence(rule):
    """Inputs are the queries, keys and values side by side, and the output matrix leaves heads as they are."""
    with np.load(Path(__file__).parent / "golden" / "infini_attention.npz") as held:
        given = {key: held[key] for key in held}
    size = HEADS * DIM
    attention = Attention(heads=HEADS, kv_heads=HEADS, head_dim=DIM, rope="none", mask=Chunk(size=SEGMENT))
    inherited = Inherited(width=3 * size, depth=1, rope=None, compute="float32", rules=Rules())
    module = InfiniAttention(attention=attention, rule=rule).build(inherited, rngs=nnx.Rngs(0))
    for n, name in enumerate(("query", "key", "value")):
        getattr(module.attention, name)[...] = jnp.eye(3 * size)[:, n * size : (n + 1) * size].reshape(-1, HEADS, DIM)
    module.attention.output[...] = jnp.eye(size, 3 * size).reshape(HEADS, DIM, -1)
    module.memory_bias[...] = jnp.asarray(given["gate"])
    tokens_first = lambda x: jnp.moveaxis(jnp.asarray(x), 1, 2).reshape(ROWS, LENGTH, size)
    x = jnp.concatenate([tokens_first(given[name]) for name in "qkv"], axis=-1)
    ones = jnp.ones((ROWS, LENGTH), jnp.int32)
    batch = Batch(tokens=ones, info=causal_info(ones))
    y, state, _ = jax.jit(lambda module, x: module(x, batch, module.init_state(ROWS, LENGTH)))(module, x)
    np.testing.assert_allclose(y[..., :size], tokens_first(given[f"{rule}/out"]), atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda module, x: module(x, batch)[0])(module, x), y, atol=1e-6)
    assert state.filled.sum(axis=1).tolist() == [LENGTH % SEGMENT] * ROWS
