"""Every cache keeps the contract: appended in any chunks, with padding anywhere, it attends as one pass over the row does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Sink, Window
from lcx.batch import TokenInfo
from lcx.cache.cache import At, Cache
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.parts import parts
from lcx.positions.rotate import rotate
from lcx.positions.yarn import YaRN

LENGTH, HEADS, KV_HEADS, DIM, VALUE = 13, 4, 2, 8, 6
EXAMPLES = [(f"{cls.__name__}-{n}", spec) for cls in parts(Cache) for n, spec in enumerate(cls.examples())]
FREQUENCIES = YaRN(factor=4.0, original_length=32, rotary=0.5, pairing="interleaved").frequencies(DIM, LENGTH)
MASKS = {"causal": Causal(), "sink-window": Sink(size=2) | Window(size=3)}

# Left padding; two documents with padding inside the second; right padding; nothing at all.
SEGMENTS = np.asarray([[0] * 3 + [1] * 10, [1] * 4 + [0] + [2] * 3 + [0] * 2 + [2] * 3, [1] * 7 + [0] * 6, [0] * 13], np.int32)
INDEX = np.asarray([[0] * 3 + [*range(10)], [*range(4), 0, 0, 1, 2, 0, 0, 3, 4, 5], [*range(7)] + [0] * 6, [0] * 13], np.int32)
REAL = SEGMENTS != 0


def tokens(start=0) -> TokenInfo:
    index = np.where(REAL, INDEX + start, 0).astype(np.int32)
    info = TokenInfo(index=index, order=index, positions=index[..., None].astype(np.float32), segments=SEGMENTS)
    return jax.tree.map(jnp.asarray, info)


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    make = lambda heads, size: jnp.asarray(rng.normal(size=(len(SEGMENTS), LENGTH, heads, size)), jnp.float32)
    return make(HEADS, DIM), make(KV_HEADS, DIM), make(KV_HEADS, VALUE)


def one_pass(info, mask):
    q, k, v = arrays()
    q, k = (rotate(x, info.positions, FREQUENCIES) for x in (q, k))
    return attend(q, k, v, info, info, mask=mask, scale=0.3, softcap=5.0, backend="reference")


@pytest.fixture(scope="module", params=[spec for _, spec in EXAMPLES], ids=[name for name, _ in EXAMPLES])
def cache(request):
    return request.param


@functools.partial(jax.jit, static_argnames=("cache", "mask"))
def feed(cache, state, q, k, v, info, mask):
    state = cache.append(state, k, v, info, FREQUENCIES)
    raw, q = q, rotate(q, info.positions, FREQUENCIES).astype(k.dtype)
    out, lse = cache.attend(state, q, info, mask=mask, scale=0.3, softcap=5.0, frequencies=FREQUENCIES)
    asked = Asked(q=q, raw=raw, out=out, lse=lse, info=info.filled(), output=jnp.ones((HEADS, VALUE, 5)))
    rule = Rule(mask=mask, scale=0.3, softcap=5.0, bias=None)
    return cache.prune(state, asked, frequencies=FREQUENCIES, rule=rule), (out, lse)


def chunked(cache, info, mask, chunks, slots=LENGTH, dtype=jnp.float32):
    state, made, at = cache.init(len(SEGMENTS), slots, KV_HEADS, DIM, VALUE, dtype, at=At(heads=HEADS)), [], 0
    for size in chunks:
        part = slice(at, at + size)
        state, out = feed(cache, state, *(x[:, part].astype(dtype) for x in arrays()), info.take(part), mask)
        made.append(out)
        at += size
    return state, tuple(jnp.concatenate(x, axis=1) for x in zip(*made, strict=True))


def test_every_cache_has_examples():
    assert all(cls.examples() for cls in parts(Cache))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [5, 1, 7]], ids=["whole", "steps", "chunks"])
def test_any_chunks_attend_as_one_pass(cache, chunks, mask):
    info = tokens()
    _, (out, lse) = chunked(cache, info, mask, chunks)
    expected, expected_lse = one_pass(info, mask)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    assert np.isneginf(np.asarray(lse)[~REAL]).all() and not np.asarray(out)[~REAL].any()


def test_far_positions(cache):
    """A prompt cut a million tokens ago: the angles of keys are still those of one pass."""
    info = tokens(start=1_000_000)
    _, (out, _) = chunked(cache, info, Causal(), [5, 8])
    np.testing.assert_allclose(out, one_pass(info, Causal())[0], atol=5e-6)


def test_padding_consumes_nothing(cache):
    state, (out, _) = chunked(cache, tokens(), Causal(), [5, 1, 7], slots=10)
    assert state.overflow.tolist() == [0, 0, 0, 0]
    np.testing.assert_allclose(out, one_pass(tokens(), Causal())[0], atol=2e-6)
    silent = jax.tree.map(jnp.zeros_like, tokens())
    after, _ = feed(cache, state, *arrays(seed=1), silent, Causal())
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)


def test_overflow_is_counted(cache):
    state, _ = chunked(cache, tokens(), Causal(), [5, 1, 7], slots=6)
    assert state.overflow.tolist() == [4, 4, 1, 0]


def test_read_gives_rotated_keys_and_what_their_tokens_were(cache):
    info = dataclasses.replace(tokens(), roles=jnp.asarray(INDEX % 3))
    state, _ = chunked(cache, info, Causal(), [13])
    k, v, kept = cache.read(state, FREQUENCIES)
    each = KV_HEADS // k.shape[2]
    k, v = (
        jnp.moveaxis(x.reshape(len(REAL), each, x.shape[1], -1, x.shape[3]), 1, 2).reshape(len(REAL), x.shape[1], KV_HEADS, -1)
        for x in (k, v)
    )
    kept = jax.tree.map(lambda x: x[::each], kept)
    _, raw, values = arrays()
    rotated = rotate(raw, info.positions, FREQUENCIES)
    for row, real in enumerate(REAL):
        n = real.sum()
        np.testing.assert_allclose(k[row, :n], rotated[row, real], atol=2e-6)
        np.testing.assert_array_equal(v[row, :n], values[row, real])
        for field in ("index", "order", "positions", "segments", "roles"):
            np.testing.assert_array_equal(getattr(kept, field)[row, :n], getattr(info, field)[row, real])
        assert not kept.segments[row, n:].any()


def test_bfloat16_is_close(cache):
    _, (out, _) = chunked(cache, tokens(), Causal(), [5, 8], dtype=jnp.bfloat16)
    np.testing.assert_allclose(out, one_pass(tokens(), Causal())[0], atol=0.05)
    assert out.dtype == jnp.float32
