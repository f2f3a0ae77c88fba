"""The ring: what a window reaches of a row is found there, whatever the passes; what may be missing is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Chunk, Sink, Window
from lcx.batch import TokenInfo, causal_info
from lcx.cache.cache import At
from lcx.cache.dense import DenseCache
from lcx.cache.ring import RingCache
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.positions.alibi import ALiBi
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.spec import SpecError

LENGTH, HEADS, KV_HEADS, DIM, VALUE, SIZE = 40, 4, 2, 8, 6, 7
FREQUENCIES = Rope().frequencies(DIM, LENGTH)
# One document; three of them with padding between and in them; left padding and a short row; nothing.
SEGMENTS = np.asarray(
    [
        [1] * 40,
        [1] * 9 + [0] * 2 + [2] * 3 + [0] + [2] * 10 + [3] * 15,
        [0] * 11 + [4] * 9 + [0] * 20,
        [0] * 40,
    ],
    np.int32,
)
MASKS = {
    "window": (Window(size=SIZE), {}),
    "window and chunk": (Window(size=SIZE) & Chunk(size=9), {"softcap": 3.0}),
    "chunk": (Chunk(size=SIZE), {"bias": ALiBi()}),
}


def arrays(rows=len(SEGMENTS), seed=0):
    rng = np.random.default_rng(seed)
    make = lambda heads, size: jnp.asarray(rng.normal(size=(rows, LENGTH, heads, size)), jnp.float32)
    return make(HEADS, DIM), make(KV_HEADS, DIM), make(KV_HEADS, VALUE)


def one_pass(info, **options):
    q, k, v = arrays(len(info.index))
    q, k = rotate(q, info.positions, FREQUENCIES), rotate(k, info.positions, FREQUENCIES, side="key")
    return attend(q, k, v, info, info, scale=0.4, backend="reference", **options)


@functools.partial(jax.jit, static_argnames=("cache", "mask", "softcap", "bias"))
def step(cache, state, q, k, v, info, mask, **options):
    state = cache.append(state, k, v, info, FREQUENCIES)
    turned, rule = rotate(q, info.positions, FREQUENCIES), {"softcap": None, "bias": None} | options
    found = cache.attend(state, turned, info, mask=mask, scale=0.4, frequencies=FREQUENCIES, **options)
    asked = Asked(q=turned, raw=q, out=found[0], lse=found[1], info=info.filled(), output=jnp.ones((HEADS, VALUE, 5)))
    return cache.prune(state, asked, frequencies=FREQUENCIES, rule=Rule(mask=mask, scale=0.4, **rule)), found


def fed(cache, info, sizes, mask=Window(size=SIZE), length=LENGTH, **options):
    rows = len(info.index)
    state, made, at = cache.init(rows, length, KV_HEADS, DIM, VALUE, jnp.float32, at=At(reach=mask.reach)), [], 0
    for size in sizes:
        part = slice(at, at + size)
        state, found = step(cache, state, *(x[:, part] for x in arrays(rows)), info.take(part), mask, **options)
        made.append(found)
        at += size
    return state, tuple(jnp.concatenate(x, axis=1) for x in zip(*made, strict=True))


@pytest.mark.parametrize(
    "name, keys, sizes",
    [
        ("window", "rotated", [23, 1, 1, 1, 1, 1, 1, 11]),
        ("window and chunk", "raw", [1] * 40),
        ("chunk", "rotated", [23, 1, 1, 1, 1, 1, 1, 11]),
        pytest.param("window", "raw", [40], marks=pytest.mark.slow),
        pytest.param("window", "raw", [3, 1, 7, 8, 6, 1, 14], marks=pytest.mark.slow),
    ],
)
def test_passes_of_any_size_attend_as_one_over_the_whole_row(name, keys, sizes):
    info = causal_info(SEGMENTS)
    mask, options = MASKS[name]
    state, (out, lse) = fed(RingCache(keys=keys), info, sizes, mask, **options)
    wanted, wanted_lse = one_pass(info, mask=mask, **options)
    np.testing.assert_allclose(out, wanted, atol=3e-6)
    np.testing.assert_allclose(lse, wanted_lse, atol=3e-6)
    assert state.size == SIZE and not state.overflow.any() and state.in_turn.all()


def test_the_newest_tokens_are_held_each_in_its_place():
    info = causal_info(SEGMENTS)
    state, _ = fed(RingCache(size=SIZE), info, [23, 1, 1, 1, 1, 1, 1, 11])
    index = np.asarray(state.slots.info.index)
    assert [index[0, n % SIZE] for n in range(33, 40)] == [*range(33, 40)]
    assert [index[1, n % SIZE] for n in range(30, 37)] == [*range(8, 15)]
    assert sorted(index[2].tolist()) == [*range(2, 9)] and not np.asarray(state.slots.info.segments)[3].any()


def test_a_state_for_long_rows_is_as_large_as_its_window():
    make = lambda length: jax.eval_shape(lambda: RingCache().init(2, length, 4, 8, 8, jnp.bfloat16, at=At(reach=4096)))
    shapes = lambda state: [x.shape for x in jax.tree.leaves(state)]
    assert shapes(make(1 << 17)) == shapes(make(1 << 20)) and make(1 << 20).size == 4096
    assert make(100).size == 100


def test_short_rows_are_held_whole_under_any_mask():
    info = causal_info(SEGMENTS)
    state, (out, _) = fed(RingCache(size=64), info, [29, 11], Causal())
    np.testing.assert_allclose(out, one_pass(info, mask=Causal())[0], atol=3e-6)
    assert state.size == LENGTH and not state.overflow.any()
    assert fed(RingCache(size=64), info, [29, 11], Causal(), length=30)[0].overflow.tolist() == [10, 7, 0, 0]


def interleaved(kind):
    """Rows of which a window may reach far back: [1, 40]."""
    if kind == "documents":
        return causal_info(np.asarray([[1] * 6 + [2] * 10 + [1] * 24], np.int32))
    segments = np.asarray([[-1] * 6 + [1] * 34 if kind == "shared" else [1] * 20 + [2] * 10 + [-2] * 10], np.int32)
    return causal_info(segments)


@pytest.mark.parametrize("kind", ["documents", pytest.param("shared", marks=pytest.mark.slow), "reader"])
def test_what_may_be_missing_is_counted(kind):
    """Documents that others interrupt, tokens that all see, and tokens that see all are right where all is held."""
    info = interleaved(kind)
    state, (out, _) = fed(RingCache(size=LENGTH), info, [29, 11])
    wanted = one_pass(info, mask=Window(size=SIZE))[0]
    np.testing.assert_allclose(out, wanted, atol=3e-6)
    assert not state.overflow.any()
    state, (out, _) = fed(RingCache(size=SIZE), info, [1] * 40)
    wrong = (np.abs(out - wanted).max(axis=(2, 3)) > 1e-5).sum()
    assert 0 < wrong <= state.overflow[0]


def test_a_document_that_goes_on_in_the_same_pass_is_not_forgotten():
    """Interrupted while all is at hand, read on by later passes when it is not."""
    segments = np.asarray([[1] * 6 + [2] * 10 + [1] * 24], np.int32)
    state, (out, _) = fed(RingCache(size=SIZE), causal_info(segments), [17, 1, 22])
    wanted = one_pass(causal_info(segments), mask=Window(size=SIZE))[0]
    assert np.abs(out - wanted)[0, 17].max() > 1e-5 and not state.in_turn[0] and state.overflow[0] == 23


@pytest.mark.slow
def test_gradients_are_those_of_a_dense_cache():
    info = causal_info(SEGMENTS[:3])
    q, k, v = arrays(3)

    @functools.partial(jax.grad, argnums=(1, 2, 3))
    def slope(cache, q, k, v):
        total, at = 0.0, 0
        state = cache.init(3, LENGTH, KV_HEADS, DIM, VALUE, jnp.float32, at=At(reach=SIZE))
        for size in (29, 1, 10):
            part = slice(at, at + size)
            state, (out, _) = step(cache, state, q[:, part], k[:, part], v[:, part], info.take(part), Window(size=SIZE))
            total, at = total + (out * jnp.cos(jnp.arange(VALUE))).sum(), at + size
        return total

    for found, wanted in zip(slope(RingCache(), q, k, v), slope(DenseCache(), q, k, v), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_what_it_cannot_hold_is_refused():
    info: TokenInfo = causal_info(SEGMENTS)
    for mask in (Window(size=SIZE + 1), Causal(), Sink(size=1) | Window(size=2)):
        with pytest.raises(ValueError, match="expected one that reaches at most the 7 tokens that the ring holds"):
            fed(RingCache(size=SIZE), info, [LENGTH], mask)
    with pytest.raises(ValueError, match=r"cache\.size = None: expected a number of tokens beside a mask without a bound"):
        fed(RingCache(), info, [LENGTH], Causal())
    with pytest.raises(SpecError, match=r"RingCache\.size = 0: expected at least 1 token"):
        RingCache(size=0)
