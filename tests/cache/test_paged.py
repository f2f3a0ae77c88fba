"""The paged cache: rows of any lengths on one pool, pages in any order, taken as rows grow and given back when they end."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from lcx.attention.mask import Causal, Window
from lcx.batch import causal_info
from lcx.cache import paged
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.dense import DenseCache
from lcx.cache.paged import PagedCache
from lcx.spec import SpecError
from tests.cache.driven import DIM, HEADS, KV_HEADS, SCALE, passes, run

PAGE = 4


@functools.partial(jax.jit, static_argnames=("cache", "rows"))
def empty(cache, rows):
    return cache.init(rows, 16, KV_HEADS, DIM, DIM, jnp.float32)


@functools.partial(jax.jit, static_argnames="cache")
def put(cache, state, k, v, info):
    return cache.append(state, k, v, info, None)


@functools.partial(jax.jit, static_argnames=("cache", "mask", "softcap"))
def attend(cache, state, q, info, mask=Causal(), softcap=None):
    return cache.attend(state, q, info, mask=mask, scale=SCALE, softcap=softcap, frequencies=None)


@jax.jit
def released(state, rows):
    return state.released(rows)


def table(state):
    """The pages of each row."""
    return [[n for n in row if n < len(state.free)] for row in np.asarray(state.table).tolist()]


def free(state):
    return sorted(np.asarray(state.free)[: int(state.left[0])].tolist())


def ragged(lengths, seed=0):
    """(k, v, info) of rows of these lengths, padded on the right."""
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    segments = (np.arange(longest) < np.asarray(lengths)[:, None]).astype(np.int32)
    make = lambda: jnp.asarray(rng.normal(size=(len(lengths), longest, KV_HEADS, DIM)), jnp.float32)
    return make(), make(), causal_info(segments)


def shuffled(state, seed=0):
    """The same rows with other pages, in any order."""
    order = np.random.default_rng(seed).permutation(len(state.free))
    where = np.argsort(order)  # page n lies at where[n]
    numbers = np.append(where, len(order))
    moved = {"k": state.k[order], "v": state.v[order], "free": jnp.asarray(where)[state.free]}
    return dataclasses.replace(state, table=jnp.asarray(numbers)[state.table], **moved)


@pytest.mark.parametrize("window, softcap", [(None, None), (6, 5.0)])
def test_ragged_rows_find_what_the_reference_kernel_finds(window, softcap):
    """JAX's own reference of ragged paged attention, on the same pool and table: nothing, one token, whole pages, more."""
    lengths, asked = [0, 1, PAGE, 3 * PAGE, 11], [0, 1, 2, 3, 1]
    k, v, info = ragged(lengths)
    cache = PagedCache(page=PAGE, pages=9)
    state = put(cache, empty(cache, 5), k, v, info)
    state = shuffled(state)
    assert sum(map(len, table(state))) == 8 and len(free(state)) == 1
    q = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3, HEADS, DIM)), jnp.float32)
    segments = (np.arange(3) < np.asarray(asked)[:, None]).astype(np.int32)
    q_info = causal_info(segments, start=jnp.asarray(lengths) - jnp.asarray(asked))
    mask = Causal() if window is None else Window(size=window)
    out, _ = attend(cache, state, q, q_info, mask, softcap)
    both = jnp.stack([state.k, state.v], axis=3).reshape(*state.k.shape[:2], 2 * KV_HEADS, DIM)
    rows = [n for n in range(5) if asked[n]]
    wanted = ref_ragged_paged_attention(
        jnp.concatenate([q[n, : asked[n]] for n in rows]),
        both,
        jnp.asarray([lengths[n] for n in rows]),
        jnp.minimum(state.table[jnp.asarray(rows)], len(both) - 1),
        jnp.asarray(np.cumsum([0, *(asked[n] for n in rows)])),
        jnp.asarray([len(rows)]),
        sm_scale=SCALE,
        sliding_window=window,
        soft_cap=softcap,
    )
    np.testing.assert_allclose(jnp.concatenate([out[n, : asked[n]] for n in rows]), wanted, atol=2e-6)
    assert not np.asarray(out)[0].any()


@pytest.mark.parametrize("span", [8, pytest.param(2048, marks=pytest.mark.slow)])
def test_passes_find_what_a_dense_cache_finds(span, monkeypatch):
    """With spans of a few pages too, the last of them empty."""
    monkeypatch.setattr(paged, "SPAN", span)
    given, found = list(passes([21, 1, 1, 1, 1, 12], padding=5)), {}
    for cache in (DenseCache(), PagedCache(page=PAGE)):
        note = lambda *a, name=type(cache).__name__: found.setdefault(name, []).append(a[5:7])
        run(cache, given, length=50, each=note)
    for ours, wanted in zip(found["PagedCache"], found["DenseCache"], strict=True):
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("codec", [Int8(), Fp8()], ids=repr)
def test_coded_pages_are_attended_to_as_what_their_codes_stand_for(codec, monkeypatch):
    """In passes of several and of one, in spans of two pages; raw keys are turned when they are read."""
    monkeypatch.setattr(paged, "SPAN", 8)
    rounded = lambda x: jnp.moveaxis(codec.keys.decode(codec.keys.encode(jnp.moveaxis(x, 1, 2))), 1, 2)
    given = list(passes([21, 1, 1, 12], padding=5))
    decoded = [(q, rounded(k), rounded(v), info) for q, k, v, info in given]
    found = {}
    for name, cache, those in (
        ("coded", PagedCache(page=PAGE, codec=codec, keys="raw"), given),
        ("decoded", DenseCache(keys="raw"), decoded),
    ):
        run(cache, those, length=50, each=lambda *a, name=name: found.setdefault(name, []).append(a[5:7]))
    for ours, wanted in zip(found["coded"], found["decoded"], strict=True):
        for a, b in zip(ours, wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6)


def test_codecs_that_code_tokens_together_are_for_other_caches():
    for codec in (IntGroups(), KIVI()):
        with pytest.raises(
            SpecError, match=r"codec = .*expected one that codes each token by itself: Plain\(\), Int8\(\) or Fp8"
        ):
            PagedCache(codec=codec)


def test_pages_are_taken_as_rows_grow_and_given_back():
    cache = PagedCache(page=PAGE, pages=6)
    k, v, info = ragged([5, 1, 0])
    state = put(cache, empty(cache, 3), k, v, info)
    assert table(state) == [[0, 1], [2], []] and free(state) == [3, 4, 5]
    one = causal_info(np.asarray([[1], [1], [0]]))
    for wanted in ([[0, 1], [2], []],) * 3 + ([[0, 1, 3], [2, 4], []],):
        state = put(cache, state, k[:, :1], v[:, :1], one)
        assert table(state) == wanted
    state = released(state, jnp.asarray([True, False, False]))
    assert table(state) == [[], [2, 4], []] and free(state) == [0, 1, 3, 5] and state.used.tolist() == [0, 5, 0]
    state = put(cache, state, k, v, causal_info(np.asarray([[0] * 5, [0] * 5, [1] * 5])))
    assert len(table(state)[2]) == 2 and len(free(state)) == 2 and not state.overflow.any()
    held = [page for row in table(state) for page in row]
    assert sorted(held + free(state)) == [*range(6)]


def test_a_row_read_alone_takes_its_seat():
    cache = PagedCache(page=PAGE, pages=7)
    k, v, info = ragged([5, 9, 2])
    state = put(cache, empty(cache, 3), k, v, info)
    new_k, new_v, new_info = ragged([11], seed=1)
    alone = put(cache, empty(cache, 1), new_k, new_v, new_info)
    state = jax.jit(lambda s, a, row: s.seated(a, row))(state, shuffled(alone), jnp.int32(1))
    found_k, found_v, found = cache.read(state, None)
    for row, (wanted_k, wanted_v, n) in enumerate([(k[0], v[0], 5), (new_k[0], new_v[0], 11), (k[2], v[2], 2)]):
        np.testing.assert_array_equal(found_k[row, :n], wanted_k[:n])
        np.testing.assert_array_equal(found_v[row, :n], wanted_v[:n])
        assert (np.asarray(found.segments[row]) != 0).sum() == n
    assert len(free(state)) == 1 and not state.overflow.any()


def test_what_finds_no_page_is_counted():
    cache = PagedCache(page=PAGE, pages=3)
    k, v, info = ragged([7, 9, 3])
    state = put(cache, empty(cache, 3), k, v, info)
    assert table(state) == [[0, 1], [2], []] and state.overflow.tolist() == [0, 5, 3]
    assert cache.fits([4, 4, 4]) and not cache.fits([5, 4, 4]) and PagedCache().fits([1 << 20] * 9)


def test_what_another_row_left_in_a_page_is_not_read():
    cache = PagedCache(page=PAGE, pages=2)
    k, v, info = ragged([8])
    wrong = jnp.full_like(v, jnp.nan)
    state = put(cache, empty(cache, 1), wrong, wrong, info).released(jnp.asarray([True]))
    state = put(cache, state, k[:, :3], v[:, :3], info.take(slice(0, 3)))
    q = jnp.ones((1, 1, HEADS, DIM))
    out, _ = attend(cache, state, q, info.take(slice(2, 3)))
    assert np.isfinite(out).all()


def test_impossible_pools_are_refused():
    for fields, message in (({"page": 0}, r"PagedCache\.page = 0"), ({"pages": 0}, r"PagedCache\.pages = 0")):
        with pytest.raises(SpecError, match=message):
            PagedCache(**fields)
