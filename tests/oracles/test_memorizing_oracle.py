"""Memorizing Transformers: a whole layer over segments as it is written, and the authors' attention to what they found."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from memorizing_layer import DIM, HEADS, LENGTH, NEAR, ROWS

from lcx.batch import Batch, causal_info
from lcx.mixers.attention import Attention
from lcx.mixers.memorizing import MemorizingAttention, unit
from lcx.mixers.mixer import Inherited
from lcx.parallel.rules import Rules

SIZE = HEADS * DIM


def module_of(**options):
    """Inputs are queries, keys and values side by side, and the output matrix leaves heads as they are."""
    attention = Attention(heads=HEADS, kv_heads=HEADS, head_dim=DIM, rope="none")
    inherited = Inherited(width=3 * SIZE, depth=1, rope=None, compute="float32", rules=Rules(), documents=2)
    module = MemorizingAttention(attention=attention, **options).build(inherited, rngs=nnx.Rngs(0))
    for n, name in enumerate(("query", "key", "value")):
        getattr(module.attention, name)[...] = jnp.eye(3 * SIZE)[:, n * SIZE : (n + 1) * SIZE].reshape(-1, HEADS, DIM)
    module.attention.output[...] = jnp.eye(SIZE, 3 * SIZE).reshape(HEADS, DIM, -1)
    return module


def test_what_is_found_is_attended_to_as_the_authors_do():
    """Of what their search found in segments whose memory holds as much: theirs may miss nearer ones."""
    with np.load(Path(__file__).parent / "golden" / "memorizing_layer.npz") as held:
        given = {key: jnp.asarray(held[key]) for key in held}
    module = module_of(segment=NEAR, entries=NEAR, near=NEAR)
    module.memory_scale[...] = given["scale"]
    external = jax.jit(module.external)
    for segment in (1, 3, 4):
        q = unit(given["q"][segment])
        for t in range(LENGTH):
            for head in range(HEADS):
                of_head = lambda name, s=segment, t=t, head=head: given[name][s, :, t, head][:, :, None].repeat(HEADS, axis=2)
                found = external(q[:, t : t + 1], of_head("near_keys"), of_head("near_values"), jnp.ones((ROWS, NEAR), bool))
                full = np.abs(of_head("near_keys")).sum(axis=(1, 2, 3)) > 0
                assert full.any()
                np.testing.assert_allclose(found[full, 0, head], given["external"][segment, :, t, head][full], atol=2e-6)


def test_the_layer_is_as_it_is_written():
    """Two documents, segments of 3, the nearest 2 of the last 6 entries."""
    module = module_of(segment=3, entries=6, near=2, scale=5.0)
    module.memory_bias[...] = jnp.asarray([0.3, -0.7])
    segments = np.asarray([[1] * 14 + [2] * 5])
    x = np.random.default_rng(0).normal(size=(1, 19, 3 * SIZE))
    batch = Batch(tokens=jnp.zeros(segments.shape, jnp.int32), info=causal_info(segments))
    y = jax.jit(lambda module, x: module(x, batch)[0])(module, jnp.asarray(x, jnp.float32))
    q, k, v = (part.reshape(19, HEADS, DIM) for part in np.split(x[0], 3, axis=-1))
    scaled = lambda z: z / np.sqrt((z * z).sum(axis=-1, keepdims=True) + 1e-6)
    share = 1 / (1 + np.exp(-np.asarray(module.memory_bias[...], np.float64)))
    for begin, end in ((0, 14), (14, 19)):
        for t in range(begin, end):
            written = begin + (t - begin) // 3 * 3
            entries = range(max(begin, written - 6), written)
            for head in range(HEADS):
                weights = np.exp(k[begin : t + 1, head] @ q[t, head] / np.sqrt(DIM))
                wanted = weights @ v[begin : t + 1, head] / weights.sum()
                if entries:
                    scores = scaled(k[:, head])[list(entries)] @ scaled(q[t, head])
                    near = np.argsort(-scores)[:2]
                    weights = np.exp(5 * scores[near])
                    external = weights @ v[list(entries), head][near] / weights.sum()
                    wanted = share[head] * external + (1 - share[head]) * wanted
                np.testing.assert_allclose(y[0, t, head * DIM : (head + 1) * DIM], wanted, atol=1e-5)
