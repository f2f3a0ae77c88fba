"""The tiled XLA form equals the float32 reference in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Causal, Hide, Sink, Window
from pallas_kernels.tile_attention import reference, xla
from pallas_kernels.tile_attention.tokens import Tokens


def packed_tokens(rng, rows, length):
    """Documents in a row, with padding, shared and reader segments, and roles."""
    segments = np.sort(rng.integers(-2, 5, (rows, length)), axis=1)
    index = np.zeros_like(segments)
    for row, own in zip(index, segments, strict=True):
        for segment in set(own):
            row[own == segment] = np.arange((own == segment).sum())
    return Tokens(*(jnp.asarray(x, jnp.int32) for x in (index, index, segments, rng.integers(0, 2, (rows, length)))))


@pytest.mark.parametrize(
    "shape, mask, softcap",
    [
        ((2, 7, 9, 4, 2, 8, 5), Causal(), None),
        ((3, 300, 300, 4, 2, 8, 8), Window(size=40) | Sink(size=3), 5.0),
        ((1, 513, 700, 2, 2, 8, 4), Causal(), None),
        ((4, 1, 5000, 4, 1, 8, 8), Causal(), None),
        ((2, 1000, 30, 2, 1, 8, 8), Hide(query_role=1, key_role=0), None),
    ],
)
def test_value_and_gradient(shape, mask, softcap):
    B, T, S, H, K, D, E = shape
    rng = np.random.default_rng(T)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, H, D), (B, S, K, D), (B, S, K, E)))
    d_out, d_lse = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((B, T, H, E), (B, T, H)))
    q_tokens, k_tokens = packed_tokens(rng, B, T), packed_tokens(rng, B, S)

    def run(form):
        call = lambda q, k, v: form(q, k, v, q_tokens, k_tokens, mask=mask, scale=0.3, softcap=softcap)
        (out, lse), pull = jax.vjp(jax.jit(call), q, k, v)
        return out, lse, *pull((d_out, jnp.where(lse == -jnp.inf, 0, d_lse)))

    names = ("out", "lse", "dq", "dk", "dv")
    for name, value, expected in zip(names, run(xla.attention), run(reference.attention), strict=True):
        largest = np.abs(expected[np.isfinite(expected)]).max()
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6 * largest, err_msg=name)
