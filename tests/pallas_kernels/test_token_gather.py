"""What a policy keeps, fetched by the kernel for TPUs, interpreted: bit by bit as indexing has it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_gather import op


def arrays(tokens):
    """Of every type and width that caches hold, among them what is no number."""
    random = np.random.default_rng(tokens)
    of = lambda *shape: random.normal(size=(2, 2, tokens, *shape)).astype(np.float32)
    strange = of(32)
    strange[:, :, ::7] = np.nan
    strange[:, :, ::5] = -np.inf
    return {
        "numbers": of(128),
        "strange": jnp.asarray(strange),
        "halves": jnp.asarray(of(64), jnp.bfloat16),
        "codes": random.integers(0, 256, (2, 2, tokens, 128)).astype(np.uint8),
        "eights": jnp.asarray(of(32), jnp.float8_e4m3fn),
        "places": random.integers(0, 1 << 16, (2, 2, tokens, 3)).astype(np.uint16),
        "segments": random.integers(-9, 1 << 30, (2, 2, tokens)).astype(np.int32),
        "marks": of(),
        "there": of() > 0,
    }


@pytest.mark.parametrize(("tokens", "kept"), [(1300, 700), (90, 40), (600, 1100)])
def test_takes_what_is_there(tokens, kept):
    tree = arrays(tokens)
    index = np.sort(np.random.default_rng(1).integers(0, tokens, (2, 2, kept)), axis=2).astype(np.int32)
    index[0, 0] = np.minimum(index[0, 0], 33)  # the rest of a row is filled up with one place
    index[1, 0] = tokens - 1
    found = op.by_kernel(jax.tree.map(jnp.asarray, tree), jnp.asarray(index), interpret=True)
    for name, x in tree.items():
        x = np.asarray(x)
        wanted = np.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 3)), axis=2)
        assert np.asarray(found[name]).tobytes() == wanted.tobytes(), name


def test_places_in_any_order(monkeypatch):
    """Where a policy names its tokens so, a list of pairs of growing places would miss some."""
    kernel = op.by_kernel
    monkeypatch.setattr(op, "platform", lambda: "tpu")
    monkeypatch.setattr(op, "by_kernel", functools.partial(kernel, interpret=True))
    x = jnp.arange(2 * 1200 * 32, dtype=jnp.float32).reshape(2, 1200, 32)
    growing = np.stack([np.arange(0, 1200, 2), np.arange(1, 1200, 2)])
    for index in (growing, growing[:, ::-1], np.random.default_rng(0).permuted(growing, axis=1)):
        wanted = jnp.take_along_axis(x, index[..., None], axis=1)
        np.testing.assert_array_equal(jax.jit(op.gathered)(x, jnp.asarray(index)), wanted)
