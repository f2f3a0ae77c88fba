"""Squeezed Attention against its authors' code, and against its method in NumPy; what is not clustered is read."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Causal, Window
from lcx.batch import PADDING
from lcx.cache.codecs.groups import KIVI
from lcx.cache.codecs.scaled import Int8
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.scorer import Rule
from lcx.cache.selectors.clusters import Clusters, Level, mean_scores, means, scores
from lcx.cache.selectors.kmeans import directions, kmeans
from lcx.cache.selectors.squeezed import Coarse, Squeezed, SqueezedHeads
from lcx.inference.squeeze import log_quantile
from lcx.positions.rotate import rotate
from lcx.record import replaced
from lcx.spec import SpecError
from tests.cache.driven import FREQUENCIES, SCALE, expected, passes, run, step

GOLDEN = Path(__file__).parents[1] / "oracles" / "golden" / "squeezed.npz"
SQUEEZED = Squeezed(observed=6, clusters=0.3, gathered=0.7)
RULE = Rule(mask=Causal(), scale=SCALE, softcap=None, bias=None)


@functools.cache
def golden():
    with np.load(GOLDEN) as held:
        return {name: held[name] for name in held.files}


def level(k, counts, bound):
    return Level(k=jnp.asarray(k), counts=jnp.asarray(counts), bounds=jnp.full((*counts.shape[:2], 2), np.log(bound)))


def counted(labels, size):
    return (labels[..., None] == np.arange(size)).sum(axis=2)


def test_clusters_are_worth_what_they_are_to_the_authors():
    """Of one layer a row: means, scores of the last queries' mean, and the quantiles of all of them."""
    held = {name: jnp.asarray(x) for name, x in golden().items()}
    labels, C, TOPS = held["labels"], held["centroids"].shape[2], held["tops"].shape[2]
    alike = lambda x, labels, size: means(x, labels, jnp.ones_like(labels), size)[0]
    of = lambda x, labels, size: np.stack([alike(*layer, size) for layer in zip(x, labels, strict=True)])
    np.testing.assert_allclose(of(held["k"][:, :, : labels.shape[2]], labels, C), held["centroids"], atol=1e-6)
    np.testing.assert_allclose(of(held["centroids"], held["parents"], TOPS), held["tops"], atol=1e-6)
    q, rule = jnp.moveaxis(held["q"][:, :, -8:], 1, 2), dataclasses.replace(RULE, scale=64**-0.5)
    above = jnp.take_along_axis(held["parents"], labels, axis=2)
    for name, k, own in (("thresholds", "centroids", labels), ("thresholds/tops", "tops", above)):
        counts = counted(own, held[k].shape[2])
        found = np.asarray(mean_scores(q, jnp.ones((2, 8), bool), held[k], counts, rule))
        if name == "thresholds":
            np.testing.assert_allclose(np.exp(np.take_along_axis(found, own, axis=2)), held["scores"], rtol=2e-5)
        bounds = [np.exp(log_quantile([*zip(found, np.asarray(counts), strict=True)], share)) for share in (0.5, 0.7, 0.8, 0.9)]
        np.testing.assert_allclose(bounds, held[name], rtol=2e-5)


@pytest.mark.parametrize("which", ["read", "both"])
def test_reads_what_the_authors_read(which):
    """For queries behind the prefix, several and one, with a level above and without; thresholds are the authors'."""
    held, C, TOPS = {name: jnp.asarray(x) for name, x in golden().items()}, 6, 3
    labels = held["labels"]
    above = jnp.take_along_axis(held["parents"], labels, axis=2)
    coarse = level(held["tops"], counted(above, TOPS), held["thresholds/tops"][0]) if which == "both" else None
    for n, share in enumerate((0.5, 0.7, 0.8, 0.9)):
        fine = level(held["centroids"], counted(labels, C), held["thresholds"][n])
        told = Clusters(labels=labels, fine=fine, parents=jnp.asarray(held["parents"]), coarse=coarse)
        for name in ("asked", "single"):
            q = jnp.moveaxis(held[name], 1, 2)
            rule = dataclasses.replace(RULE, scale=64**-0.5)
            chosen = np.asarray(SQUEEZED.chosen(q, jnp.ones(q.shape[:2], bool), told, rule))
            wanted = held[f"{which}/{share}/{name}"]
            np.testing.assert_array_equal(np.take_along_axis(chosen, labels, axis=2), wanted[..., : labels.shape[2]])
            assert wanted[..., labels.shape[2] :].all()


def clustered(cache, state, quantile=0.5, seed=0):
    """With what each row has read as its prefix, and a threshold between the scores of random queries."""
    k, _, info = cache.decoded(state, FREQUENCIES)
    selector, there = cache.selector, (info.segments[:, 0] != PADDING)
    there &= info.index[:, 0] < (state.seen - selector.observed)[:, None]
    number = np.asarray([selector.number(int(n), selector.clusters) for n in there.sum(axis=1)])
    above = np.minimum(2, number)
    told = jax.jit(selector.clustered)(
        state.held.pages, k, there, jnp.asarray(number), jnp.asarray(above), jax.random.key(seed)
    )
    q = jnp.asarray(np.random.default_rng(seed).normal(size=(*there.shape[:1], 8, 4, k.shape[3])), jnp.float32)

    def bound(level):
        found = np.asarray(mean_scores(q, jnp.ones(q.shape[:2], bool), level.k, level.counts, RULE))
        return replaced(level, bounds=jnp.full(level.bounds.shape, np.quantile(found[np.isfinite(found)], quantile)))

    told = replaced(told, fine=bound(told.fine), coarse=None if told.coarse is None else bound(told.coarse))
    held = dataclasses.replace(state.held, pages=told)
    return dataclasses.replace(state, held=held, selects=jnp.ones_like(state.selects))


def of_method(q, info, told, cache):
    """Clusters that each row's key heads read, [B, K, C], in float64: softmax, mean and threshold as they are written."""
    q = np.asarray(rotate(q, info.positions, FREQUENCIES), np.float64)
    B, T, K = *q.shape[:2], told.labels.shape[1]
    q, real, which = q.reshape(B, T, K, -1, q.shape[3]), np.asarray(info.segments) != 0, int(T == 1)

    def worth(level, counts):
        weight = np.exp(SCALE * np.einsum("btkgd,bkcd->bkgtc", q, np.asarray(level.k, np.float64)))
        each = weight / np.maximum((weight * counts[:, :, None, None]).sum(axis=4, keepdims=True), 1e-300)
        mean = np.stack([each[b][:, :, real[b]].mean(axis=(1, 2)) for b in range(B)])
        return (mean > np.exp(np.asarray(level.bounds, np.float64))[..., which, None]) & (counts > 0)

    counts, passes_ = np.asarray(told.fine.counts), True
    if told.coarse is not None:
        passes_ = np.take_along_axis(worth(told.coarse, np.asarray(told.coarse.counts)), np.asarray(told.parents), axis=2)
        counts = np.where(passes_, counts, 0)
    return worth(told.fine, counts) & passes_


def left(k, v, info, read):
    """What is held, a row of every key head, without slots that are not read."""
    B, K, S = read.shape
    heads = lambda x: jnp.moveaxis(x, 2, 1).reshape(B * K, x.shape[1], 1, x.shape[3])
    info = jax.tree.map(lambda x: jnp.repeat(x, B * K // len(x), axis=0), info)
    segments = np.array(info.segments)
    segments[:, :S][~read.reshape(B * K, S)] = PADDING
    return heads(k), heads(v), replaced(info, segments=jnp.asarray(segments))


CASES = {
    "flat": KVCache(selector=SQUEEZED),
    "coarse": KVCache(selector=dataclasses.replace(SQUEEZED, coarse=Coarse(clusters=0.2))),
    "pages": KVCache(selector=dataclasses.replace(SQUEEZED, page=4, gathered=0.9)),
    "too many": KVCache(selector=dataclasses.replace(SQUEEZED, gathered=0.02)),
    "raw": KVCache(keys="raw", selector=SQUEEZED),
    "int8": KVCache(codec=Int8(), selector=SQUEEZED),
    "kivi": KVCache(codec=KIVI(bits=4, group=2, residual=3), selector=dataclasses.replace(SQUEEZED, page=32)),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c == "flat" else pytest.mark.slow) for c in CASES])
def test_reads_what_the_method_reads(case):
    """The question, padded, and tokens behind it, beside the reference over the slots that the method leaves."""
    cache, first = CASES[case], [*passes([70, 6, 1], padding=9)]
    state, apart = clustered(cache, run(cache, first[:1], length=96)), []
    for n, (q, k, v, info) in enumerate(first[1:]):
        if n == 0:
            info = replaced(info, segments=info.segments.at[1, :2].set(0))
        told = state.held.pages
        chosen, labels = of_method(q, info, told, cache), np.asarray(told.labels)
        read = (labels < 0) | np.take_along_axis(chosen, np.maximum(labels, 0), axis=2)
        state, out, lse, (held_k, held_v, held) = step(cache, state, q, k, v, info)
        wanted = expected(q, k, v, info, left(held_k, held_v, held, read))
        for a, b in zip((out, lse), wanted, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
        whole = expected(q, k, v, info, left(held_k, held_v, held, np.ones_like(read)))
        apart.append(np.abs(np.asarray(wanted[0] - whole[0])).max())
        if n == 0:
            shares = np.stack([(read & (labels >= 0)).sum(axis=2), (labels >= 0).sum(axis=2)])
            assert (shares[0] > 0).any() and (shares[0] < shares[1]).any()
    assert min(apart) > 0.01


@pytest.mark.parametrize("squeezed", [False, True])
def test_all_is_read_before_it_is_clustered_and_at_threshold_0(squeezed):
    found = []
    for cache in (KVCache(), KVCache(selector=SQUEEZED)):
        first, *rest = passes([70, 6, 1], padding=9)
        state = run(cache, [first])
        if squeezed and cache.selector is not None:
            state = clustered(cache, state)
            level = replaced(state.held.pages.fine, bounds=jnp.full_like(state.held.pages.fine.bounds, -jnp.inf))
            state = dataclasses.replace(
                state, held=dataclasses.replace(state.held, pages=replaced(state.held.pages, fine=level))
            )
        for given in rest:
            state, out, lse, _ = step(cache, state, *given)
            found.append((out, lse))
    for a, b in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(found[2:]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_key_that_is_its_own_cluster_is_worth_its_softmax():
    rng = np.random.default_rng(0)
    k, q = rng.normal(size=(2, 30, 8)), rng.normal(size=(1, 5, 4, 8))
    whole = functools.partial(kmeans, there=jnp.ones(30, bool), count=jnp.int32(30), most=40, rounds=9)
    labels = jnp.stack([whole(directions(x), key=jax.random.key(1)) for x in jnp.asarray(k)])
    assert sorted(labels[0].tolist()) == sorted(labels[1].tolist()) == [*range(30)]
    centroids, counts = means(jnp.asarray(k, jnp.float32), labels, jnp.ones_like(labels), 40)
    found = np.exp(scores(jnp.asarray(q, jnp.float32), centroids[None], counts[None], RULE))
    logits = SCALE * np.einsum("btkgd,knd->bkgtn", q.reshape(1, 5, 2, 2, 8), k)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.take_along_axis(found, labels[None, :, None, None], axis=4), softmax, rtol=1e-5)


def test_scores_have_no_size_that_overflows():
    q, k, counts = jnp.full((1, 1, 1, 4), 1e3), jnp.asarray([[[[1.0] * 4, [-1.0] * 4, [0.0] * 4]]]), jnp.asarray([[[2, 5, 0]]])
    found = np.asarray(scores(q, k, counts, dataclasses.replace(RULE, scale=1.0)))[0, 0, 0, 0]
    np.testing.assert_allclose(found, [-np.log(2), -8000 - np.log(2), -np.inf], rtol=1e-4)


def test_centres_are_the_means_of_what_is_nearest():
    """Far groups are found; at the end no point is nearer to another mean; points that are not there are no one's."""
    rng = np.random.default_rng(2)
    group = rng.integers(0, 5, 90)
    x = np.eye(8)[group] + 0.02 * rng.normal(size=(90, 8))
    there = rng.random(90) < 0.8
    labels = np.asarray(kmeans(jnp.asarray(x), jnp.asarray(there), jnp.int32(5), jax.random.key(0), most=9, rounds=300))
    assert ((labels >= 0) == there).all()
    assert len({*zip(group[there], labels[there], strict=True)}) == 5
    x = np.asarray(directions(jnp.asarray(rng.normal(size=(90, 3)))))
    labels = np.asarray(kmeans(jnp.asarray(x), jnp.asarray(there), jnp.int32(7), jax.random.key(0), most=9, rounds=300))
    centres = np.stack([x[labels == n].mean(axis=0) for n in range(7)])
    nearest = np.square(x[:, None] - centres).sum(axis=2).argmin(axis=1)
    np.testing.assert_array_equal(labels[there], nearest[there])


def test_a_head_alone_reads_its_share_in_its_best_clusters():
    scores, counts = jnp.log(jnp.asarray([[[0.1, 0.4, 0.2, 0.3]]])), jnp.asarray([[[3, 4, 2, 5]]])
    read = lambda quantile: SqueezedHeads(quantile=quantile).best(scores, counts, jnp.zeros((1, 1, 1)))[0, 0].tolist()
    assert read(0.5) == [False, True, False, False]
    assert read(0.3) == [False, True, False, True]
    assert read(0.0) == [True] * 4
    drawn = SqueezedHeads(quantile=0.5, by="chance")
    scores = jnp.broadcast_to(scores, (1, 64, 4)) + jnp.arange(64.0)[:, None]
    often = np.asarray(drawn.best(scores, jnp.full((1, 64, 4), 5), jnp.zeros((1, 64, 1))))[0]
    assert (often.sum(axis=1) == 2).all() and (np.abs(often.mean(axis=0) - 0.5) < 0.2).all()


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpecError, match=r"selector = Squeezed.*None beside policy = Evict"):
        KVCache(policy=Evict(score=KeyNorm(), keep=0.5), selector=SQUEEZED)
    with pytest.raises(SpecError, match=r"selector = Squeezed.*multiple of the 32 tokens"):
        KVCache(codec=KIVI(), selector=SQUEEZED)
    with pytest.raises(SpecError, match=r"coarse = Coarse.*fewer clusters than clusters = 0.05"):
        Squeezed(coarse=Coarse(clusters=0.5))
    with pytest.raises(SpecError, match=r"coarse = Coarse.*each head has its share"):
        SqueezedHeads(coarse=Coarse())
    cache, (first, second) = KVCache(selector=SQUEEZED), passes([70, 6])
    state = run(cache, [first])
    state = dataclasses.replace(state, selects=jnp.ones_like(state.selects))
    with pytest.raises(ValueError, match="mask = Causal"):
        step(cache, state, *second, mask=Window(size=9))
