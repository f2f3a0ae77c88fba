"""Selectors: Quest against its authors' attention, whole budgets against all slots, pages against a choice token by token."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lcx.attention.mask import Causal, Window, tokens_of
from lcx.batch import causal_info
from lcx.cache.cache import At
from lcx.cache.codecs.groups import KIVI
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.cache.selectors.quest import Quest
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.rotate import rotate
from lcx.record import replaced
from lcx.spec import SpecError
from tests.cache.driven import FREQUENCIES, expected, passes, run

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden" / "quest.npz"
KINDS = {
    "plain": KVCache(),
    "raw": KVCache(keys="raw"),
    "kivi": KVCache(codec=KIVI(bits=4, group=2, residual=5)),
    "evicted": KVCache(codec=KIVI(bits=4, group=2, residual=0), policy=Evict(score=KeyNorm(), keep=64, every=16)),
}


def with_quest(cache, **options):
    return KVCache(codec=cache.codec, keys=cache.keys, policy=cache.policy, selector=Quest(dense_layers=0, **options))


@pytest.mark.parametrize("budget", [16, 32])
def test_finds_what_the_authors_find(budget):
    """Their pages are ours but for the token's own, which here is read beside those of the cache."""
    held = np.load(GOLDEN)
    cache = KVCache(selector=Quest(page=4, budget=budget - 4, dense_layers=0))
    each = lambda name: jnp.asarray(np.moveaxis(held[name], 0, 1)[None], jnp.float32)
    k, v, q = each("k"), each("v"), jnp.asarray(held["q"][None, None], jnp.float32)
    state = cache.init(1, 64, 4, 8, 8, jnp.float32, at=At(heads=4))
    options = {"mask": Causal(), "scale": 8**-0.5, "softcap": None, "bias": None}
    info = causal_info(jnp.ones((1, 60), jnp.int32))
    many = jnp.zeros((1, 60, 4, 8))
    asked = Asked(q=many, raw=many, out=many, lse=many[..., 0], info=info.filled(), output=jnp.ones((4, 8, 5)))
    state = cache.prune(cache.append(state, k[:, :60], v[:, :60], info, None), asked, frequencies=None, rule=Rule(**options))
    late = causal_info(jnp.ones((1, 1), jnp.int32), start=jnp.full(1, 60))
    out, _ = cache.attend(cache.append(state, k[:, 60:], v[:, 60:], late, None), q, late, frequencies=None, **options)
    np.testing.assert_allclose(out[0, 0], held[f"out/{budget}"], atol=2e-6)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "plain" else pytest.mark.slow) for kind in KINDS])
def test_a_budget_for_all_is_all(kind):
    found = []
    for cache in (KINDS[kind], with_quest(KINDS[kind], page=32, budget=96)):
        run(cache, passes([40, 1, 9, 1], padding=5), each=lambda *given: found.append(given[5:7]))
    for a, b in zip(jax.tree.leaves(found[:4]), jax.tree.leaves(found[4:]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def few(q, info, before, slots, page, pages, group, mask):
    """What is held, a row of every key head, with the slots alone that Quest reads of it."""
    k, v, held = before
    rows, K = len(q), k.shape[2] * len(k) // len(q)
    apart = lambda x: jnp.moveaxis(x, 2, 1).reshape(rows * K, x.shape[1], 1, x.shape[3])
    k, v = apart(k), apart(v)
    held = jax.tree.map(lambda x: jnp.repeat(x, rows * K // len(x), axis=0), held)
    queries = np.asarray(rotate(q, info.positions, FREQUENCIES)).reshape(rows * K, -1, q.shape[3])
    asks = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), tokens_of(info))
    seen = np.array(mask.visible(asks.rows(), tokens_of(held).columns())[:, 0] & (held.segments != 0))
    segments, index = np.array(held.segments), np.asarray(held.index)
    for row in range(rows * K):
        scores = np.full(slots // page, -np.inf)
        newest = np.where(seen[row, :slots], index[row, :slots], -1).max()
        for n in range(slots // page):
            here = slice(n * page, (n + 1) * page)
            if seen[row, here].any():
                keys = np.asarray(k[row, here, 0])[segments[row, here] != 0]
                bounds = np.maximum(queries[row] * keys.max(axis=0), queries[row] * keys.min(axis=0)).sum(axis=1)
                last = (index[row, here] == newest) & seen[row, here]
                scores[n] = np.inf if last.any() else getattr(bounds, group)()
        for n in np.argsort(-scores)[pages:]:
            segments[row, n * page : (n + 1) * page] = 0
    return k, v, replaced(held, segments=jnp.asarray(segments))


@pytest.mark.parametrize(
    "kind, group", [("raw", "sum"), ("evicted", "max"), pytest.param("plain", "max", marks=pytest.mark.slow)]
)
def test_reads_the_pages_whose_bounds_are_highest(kind, group):
    """Token by token: of the pages that the query sees those with the largest bounds, and the newest."""
    block = KINDS[kind].codec.block
    page, pages = max(4, block), 2 if block == 1 else 1
    cache = with_quest(KINDS[kind], page=page, budget=pages * page, group=group)
    mask, alone = Window(size=80), []

    def each(state, q, k, v, info, out, lse, before):
        if q.shape[1] > 1:
            return
        slots = state.held.info.segments.shape[2]
        wanted = expected(q, k, v, info, few(q, info, before, slots, page, pages, group, mask), mask=mask)
        dense = expected(q, k, v, info, before, mask=mask)
        alone.append(np.abs(np.asarray(wanted[0] - dense[0])).max())
        for a, b in zip((out, lse), wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=5e-6)

    run(cache, passes([90, 1, 7, 1], padding=5), length=128, each=each, mask=mask)
    assert min(alone) > 0.01


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match=r"selector = Quest.*multiple of the 32 tokens"):
        KVCache(codec=KIVI(), selector=Quest(page=8, budget=64))
    with pytest.raises(SpecError, match=r"positions = 'slots'.*'own' beside a selector"):
        KVCache(keys="raw", positions="slots", selector=Quest(budget=64))
    with pytest.raises(SpecError, match=r"selector = Quest.*None beside policy = Evict.*of all tokens"):
        KVCache(policy=Evict(score=Observed(), keep=0.5), selector=Quest(budget=64))
    with pytest.raises(SpecError, match=r"budget = 16.*at least a page of 32"):
        Quest(budget=16)


@pytest.mark.parametrize("group", ["sum", "max"])
def test_heads_of_a_group_read_the_same_pages_on_several_devices(group):
    cache = KVCache(selector=Quest(page=4, budget=8, dense_layers=0, group=group))
    first, (q, k, v, info) = passes([60, 1])
    given = cache.append(run(cache, [first]), k, v, info, FREQUENCIES)
    options = {"mask": Causal(), "scale": 0.4, "frequencies": FREQUENCIES}
    attend = jax.jit(lambda given, q, rules: cache.attend(given, q, info, rules=rules, **options), static_argnums=2)
    wanted = attend(given, rotate(q, info.positions, FREQUENCIES), Rules())
    with jax.set_mesh(MeshSpec(tensor=4).build(jax.devices()[:4])):
        found = attend(given, rotate(q, info.positions, FREQUENCIES), Rules(kv_heads=()))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_pages_that_are_worth_as_much_are_as_many_on_a_mesh():
    """Of four devices' pages, all alike, the first two and the newest, as on one device."""
    selector, q = Quest(page=4, budget=12), jnp.ones((1, 2, 1, 8))
    summaries = (jnp.ones((1, 2, 16, 8), jnp.bfloat16),) * 2
    seen, newest = jnp.ones((1, 1, 16), bool), jnp.arange(16)[None, None] == 13
    read = lambda page, chosen, pages: jnp.zeros((1, 2, pages), bool).at[:, jnp.arange(2)[:, None], page].max(chosen)
    alone = read(*selector.chosen(q, summaries, seen, newest), 16)
    assert np.flatnonzero(alone[0, 0]).tolist() == [0, 1, 13]
    with jax.set_mesh(MeshSpec(context=4).build(jax.devices()[:4])):
        one = lambda *given: read(*selector.chosen(q, *given, ("context",)), 4)
        pages = P(None, None, "context")
        shared = jax.jit(jax.shard_map(one, in_specs=pages, out_specs=pages, check_vma=False))
        np.testing.assert_array_equal(shared(summaries, seen, newest), alone)
