"""Documents packed in a row: what is promised of each, and of what a budget is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.batch import causal_info
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Even
from lcx.cache.policies.cam import CaM
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.fold import Fold
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.recency import Recency
from lcx.cache.scorers.snapkv import SnapKV
from tests.cache.driven import DIM, HEADS, KV_HEADS, VALUE, held_indices, run

PASSES = (40, 40, 1, 1)
PACKED = np.repeat([[1, 2, 3]], [30, 45, 7], axis=1)
APART = np.concatenate([PACKED, *(np.where(n == PACKED, 1, 0) for n in (1, 2, 3))])  # the others' tokens are padding


def documents(segments=APART, passes=PASSES, seed=0):
    """(q, k, v, info) of each pass, the same tokens in every row."""
    rng, info, at = np.random.default_rng(seed), causal_info(segments), 0
    make = lambda *shape: jnp.asarray(np.broadcast_to(rng.normal(size=(1, *shape)), (len(segments), *shape)), jnp.float32)
    whole = [make(sum(passes), *shape) for shape in ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE))]
    for size in passes:
        part = slice(at, at + size)
        yield *(x[:, part] for x in whole), jax.tree.map(lambda x, part=part: jnp.asarray(x[:, part]), info)
        at += size


def found(cache):
    """What all queries find, [rows, T, H, E]."""
    outs = []
    run(cache, documents(), each=lambda state, q, k, v, info, out, lse, before: outs.append(np.asarray(out)))
    return np.concatenate(outs, axis=1)


def differences(out):
    """The largest of each document, packed and apart."""
    return [float(np.abs(out[0] - out[n])[PACKED[0] == n].max()) for n in (1, 2, 3)]


ALL = {"own": Evict(score=KeyNorm(), keep=96), "shared": Evict(score=SnapKV(window=3), keep=96, heads="shared")}
BY_TOKEN = [(Int8(), None), (Plain(), None), (Fp8(), "shared"), (Int8(), "own")]


@pytest.mark.parametrize(
    "codec, policy", [pytest.param(*one, marks=pytest.mark.slow if n else ()) for n, one in enumerate(BY_TOKEN)]
)
def test_documents_are_as_if_apart_where_a_code_is_a_tokens_own(codec, policy):
    out = found(KVCache(codec=codec, policy=ALL.get(policy), keys="raw" if policy == "own" else "rotated"))
    assert max(differences(out)) < 3e-6
    assert np.abs(out).max() > 1


@pytest.mark.slow
@pytest.mark.parametrize("codec", [IntGroups(bits=8, group=2), KIVI(bits=8, group=2, residual=5), KVQuant(codebook="uniform")])
def test_blocks_and_what_waits_are_of_the_row(codec):
    """So documents are as if apart within what codes cost."""
    out, plain = found(KVCache(codec=codec, keys="raw")), found(KVCache())
    cost = np.abs(out - plain)[0].max()
    assert cost > 1e-4 and 1e-6 < max(differences(out)) <= 2 * cost


def test_a_budget_is_of_the_row_and_sinks_are_of_each_document():
    policy = Evict(score=KeyNorm(), keep=24, sinks=2, recent=3, heads="shared")
    state = run(KVCache(policy=policy), documents(passes=(82,)))
    info = jax.tree.map(lambda x: np.asarray(x)[:, 0], state.held.info)
    assert (info.segments != 0).sum(axis=1).tolist() == [24, 24, 24, 7]
    for n, newest in ((1, []), (2, []), (3, [4, 5, 6])):
        of = info.index[0][info.segments[0] == n].tolist()
        assert {0, 1, *newest} <= set(of)


MERGING = Chelsea(keep=24, chunk=16, sinks=0, recent=4), Fold(score=KeyNorm(), keep=24), CaM(score=KeyNorm(), keep=24)


@pytest.mark.parametrize("policy", MERGING, ids=lambda policy: type(policy).__name__)
def test_what_is_merged_is_of_one_document(policy):
    """Other numbers in the second document change nothing of what is held of the first but which tokens."""
    (given,) = documents(passes=(82,))
    q, k, v, info = given
    second = (jnp.asarray(APART) == 2)[..., None, None] & (jnp.arange(len(APART)) == 0)[:, None, None, None]
    states = [run(KVCache(policy=policy), [(q, k, jnp.where(second, value, v), info)]) for value in (0.0, 1000.0)]
    held = [np.asarray(state.held.v)[0] for state in states]
    segments = np.broadcast_to(np.asarray(states[0].held.info.segments)[0], held[0].shape[:2])
    assert (np.asarray(states[0].held.info.index) == np.asarray(states[1].held.info.index)).all()
    np.testing.assert_array_equal(*(x[(segments == 1) | (segments == 3)] for x in held))
    assert (segments == 1).any() and np.abs(held[0] - held[1])[segments == 2].min() > 100


@pytest.mark.slow
def test_windows_may_reach_over_documents_and_attention_does_not():
    cache = KVCache(policy=WindowKV(keep=96, window=4, suffix=4, layers=Even()))
    assert max(differences(found(cache))) < 3e-6


@pytest.mark.parametrize(
    "codec, cost", [(Plain(), 3e-6), pytest.param(KIVI(bits=8, group=2, residual=40), 0.1, marks=pytest.mark.slow)]
)
def test_slots_side_by_side_are_of_their_document(codec, cost):
    """Held keys of a document stand right before its newest tokens, whatever is read or waits of another."""
    cache = KVCache(codec=codec, keys="raw", positions="slots", policy=Evict(score=Recency(), keep=96, heads="shared"))
    assert max(differences(found(cache))) < cost


SHORT = [
    (Evict(score=SnapKV(window=12, kernel=1), keep=0.3, heads="shared"), range(14, 20)),
    (Evict(score=KeyNorm(), keep=0.3, sinks=2, recent=12, heads="shared"), [0, 1, *range(16, 20)]),
    (Chelsea(keep=0.3, chunk=4, sinks=2, recent=18), [0, 1, *range(16, 20)]),
]


@pytest.mark.parametrize(
    "policy, kept", [pytest.param(*one, marks=pytest.mark.slow if n else ()) for n, one in enumerate(SHORT)]
)
def test_the_newest_of_what_stays_do_where_a_budget_does_not_hold_all(policy, kept):
    state = run(KVCache(policy=policy), documents(np.ones((1, 20), np.int32), (20,)))
    assert held_indices(None, state)[0][0] == [*kept]
