"""Prefixes that are clustered: one threshold for all layers and heads, questions behind them, folders, meshes, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import PADDING
from lcx.cache.kv_cache import KVCache
from lcx.cache.selectors.clusters import mean_scores
from lcx.cache.selectors.squeezed import Coarse, Squeezed
from lcx.inference.generate import generate
from lcx.inference.reading import passed, prefill
from lcx.inference.saved import restore, save
from lcx.inference.squeeze import _bounds, _layers, _rule, log_quantile, shares, squeeze
from lcx.models.decoder import rebuild
from lcx.parallel.mesh import MeshSpec
from lcx.record import replaced
from lcx.spec import SpecError, edit, edits
from tests.inference.test_cached_generation import MODEL
from tests.inference.test_sharded_generation import shared_out

CACHE = "pattern[0].mixer.cache"
SQUEEZED = Squeezed(observed=6, clusters=0.4, quantile=0.6)
PROMPTS = [np.random.default_rng(n).integers(0, 250, length).tolist() for n, length in enumerate((61, 5, 40))]
QUESTION = jnp.asarray([[[9, 8, 7], [1, 2, 3], [5, 4, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]]])


@functools.cache
def model(selector=SQUEEZED, **more):
    spec = edits(MODEL, [(CACHE, KVCache(selector=selector)), *more.items()])
    return rebuild(MODEL.build(rngs=nnx.Rngs(0)), spec)


@functools.cache
def book(selector=SQUEEZED, **more):
    return squeeze(model(selector, **more), prefill(model(selector, **more), PROMPTS, 4, 16, 16))


def states(read):
    return dict(_layers(model().spec, read.state["layers"]))


def test_one_threshold_leaves_the_share_over_all_layers_and_heads():
    """Of the mean of the last queries and of each; the shares of single heads are far apart, and a short row is read whole."""
    kept, single = [], []
    for layer in states(book()).values():
        told, rule = layer.held.pages, _rule(model().spec.pattern[0].mixer)
        real = jnp.ones((4, 6), bool)
        mean = np.asarray(mean_scores(layer.newest, real, told.fine.k, told.fine.counts, rule))
        counts, bounds = np.asarray(told.fine.counts), np.asarray(told.fine.bounds)
        kept.append((np.where(mean > bounds[..., :1], counts, 0).sum(axis=2), counts.sum(axis=2)))
        for n in range(6):
            one = np.asarray(mean_scores(layer.newest[:, n : n + 1], real[:, :1], told.fine.k, told.fine.counts, rule))
            single.append(np.where(one > bounds[..., 1:], counts, 0).sum(axis=2))
    read, all_ = (np.stack([x[n] for x in kept]) for n in range(2))
    assert all_[0, :, 0].tolist() == [55, 0, 34, 0]
    share = read.sum(axis=(0, 2)) / np.maximum(all_.sum(axis=(0, 2)), 1)
    assert 0.3 <= share[0] <= 0.4 and 0.3 <= share[2] <= 0.4
    alone = np.stack(single).sum(axis=(0, 2)) / np.maximum(6 * all_.sum(axis=(0, 2)), 1)
    assert 0.37 <= alone[0] <= 0.4 and 0.37 <= alone[2] <= 0.4
    each = read[:, 0] / all_[:, 0]
    assert each.max() > each.min() + 0.1
    labels = np.asarray(states(book())[0].held.pages.labels)
    assert (labels[1] == -1).all() and (labels[0, :, 55:] == -1).all() and (labels[0, :, :55] >= 0).all()
    np.testing.assert_allclose(shares(model(), book())[0, 0].shape, (2,))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_quantile_of_numbers_that_stand_for_several(share):
    rng = np.random.default_rng(0)
    parts = [(rng.normal(size=(2, 7)), rng.integers(0, 5, (2, 7))) for _ in range(3)]
    every = np.concatenate([np.repeat(np.exp(x.ravel()), n.ravel()) for x, n in parts])
    wanted = np.log(np.quantile(every, share)) if share else -np.inf
    np.testing.assert_allclose(log_quantile(parts, share), wanted)


def test_a_single_cluster_is_read():
    """Of three tokens, all that a row has; of two clusters the better one is."""
    mean, counts = np.log([[[1 / 3, 1.0]], [[0.2, 0.4]]]), np.array([[[3, 0]], [[1, 2]]])
    scores = np.where(counts > 0, mean, -np.inf)
    (bounds,) = _bounds(SQUEEZED, [[(scores, scores[:, :, None], counts)]])
    assert np.isneginf(bounds[0]).all() and np.isfinite(bounds[1]).all()


through = jax.jit(passed)


def asked(cached, read):
    """Hidden states of a question and of a token behind it, where they are real."""
    first, read = through(cached, *QUESTION, read)
    second, _ = through(cached, QUESTION[0][:, :1], QUESTION[1][:, :1], read)
    real = QUESTION[1] != PADDING
    return np.concatenate([np.asarray(first)[real], np.asarray(second)[real[:, 0]][:, 0]])


def test_what_is_read_decides_and_nothing_does_before_it_is_clustered():
    plain = rebuild(model(), edit(model().spec, CACHE, KVCache()))
    wanted = asked(plain, prefill(plain, PROMPTS, 4, 16, 16))
    assert np.abs(asked(model(), book()) - wanted).max() > 0.01
    np.testing.assert_allclose(asked(model(), prefill(model(), PROMPTS, 4, 16, 16)), wanted, atol=2e-5)


def test_a_folder_holds_a_prefix_for_many_questions(tmp_path):
    save(tmp_path / "book", model(), book())
    np.testing.assert_array_equal(asked(model(), restore(tmp_path / "book", model())), asked(model(), book()))


@pytest.mark.slow
def test_a_prompt_is_its_own_prefix_on_a_mesh_too():
    """Alone, beside others, and on four devices."""
    wanted = generate(model(), PROMPTS, max_new=6, chunk=16)
    assert generate(model(), PROMPTS[2:], max_new=6, chunk=16)[0].ids == wanted[2].ids
    with jax.set_mesh(MeshSpec(data=2, tensor=2).build(jax.devices()[:4])):
        found = generate(shared_out(model(), jax.sharding.get_mesh()), PROMPTS, max_new=6, chunk=16)
    assert [row.ids for row in found] == [row.ids for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "selector, more",
    [
        (dataclasses.replace(SQUEEZED, coarse=Coarse(clusters=0.1)), {}),
        (dataclasses.replace(SQUEEZED, dense_layers=1), {}),
        (SQUEEZED, {"unroll": 1}),
        (SQUEEZED, {f"{CACHE}.keys": "raw"}),
    ],
    ids=["coarse", "dense first", "scanned", "raw keys"],
)
def test_levels_layers_and_keys(selector, more):
    """Scanned layers and raw keys read what rows of plain states do; the others something else than all."""
    found, wanted = asked(model(selector, **more), book(selector, **more)), asked(model(), book())
    if selector == SQUEEZED:
        np.testing.assert_allclose(found, wanted, atol=2e-4)
    else:
        assert np.abs(found - wanted).max() > 0.01
    first = states(book(selector, **more))[0]
    assert bool(np.asarray(first.selects).any()) == (selector.dense_layers == 0)


def test_what_cannot_be_squeezed_is_refused():
    plain = rebuild(model(), edit(model().spec, CACHE, KVCache()))
    with pytest.raises(SpecError, match="expected one Squeezed"):
        squeeze(plain, prefill(plain, PROMPTS[1:2], 1, 16, 16))
    read = prefill(model(), PROMPTS[1:2], 1, 16, 16)
    first = read.state["layers"][0][0]
    segments = first.held.info.segments.at[0, 0, 3:5].set(2)
    info = replaced(first.held.info, segments=segments)
    first = dataclasses.replace(first, held=dataclasses.replace(first.held, info=info))
    two = read.state | {"layers": [(first,), *read.state["layers"][1:]]}
    with pytest.raises(ValueError, match=r"rows \[0\] hold several documents"):
        squeeze(model(), dataclasses.replace(read, state=two))
