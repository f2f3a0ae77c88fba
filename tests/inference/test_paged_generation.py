"""Generation from a pool of pages: the answers of a dense cache; the engine admits what has room, and pages come back."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Window
from lcx.cache.codecs.scaled import Int8
from lcx.cache.dense import DenseCache
from lcx.cache.paged import PagedCache
from lcx.cache.pages import PagedState
from lcx.cache.ring import RingCache
from lcx.channels.glu import GLU
from lcx.inference.engine import Ask, Engine
from lcx.inference.generate import generate
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.spec import edits
from lcx.training.placement import parameter_shardings

FULL = Attention(heads=4, kv_heads=2, head_dim=8)
LOCAL = Attention(heads=4, kv_heads=2, head_dim=8, mask=Window(size=12), cache=RingCache())
MODEL = Decoder(vocab=64, width=32, pattern=tuple(Layer(mixer=m, channel=GLU(hidden=32)) for m in (FULL, LOCAL)), periods=2)
PROMPTS = [[(7 * n + 3 * i) % 64 for i in range(n)] for n in (40, 5, 25, 61, 3)]
NEW = 12


@functools.cache
def model(cache, unroll=1):
    plain = MODEL.build(rngs=nnx.Rngs(0))
    return rebuild(plain, edits(MODEL, [("pattern[0].mixer.cache", cache), ("unroll", unroll)]))


@functools.cache
def wanted():
    return generate(model(DenseCache()), PROMPTS, max_new=NEW, chunk=16)


def same(ids, logprobs, rows):
    assert ids == [row.ids for row in rows]
    for a, b in zip(logprobs, rows, strict=True):
        np.testing.assert_allclose(a, b.logprobs, atol=1e-5)


def test_pages_answer_as_a_dense_cache():
    found = generate(model(PagedCache(page=16, pages=16)), PROMPTS, max_new=NEW, chunk=16)
    same([row.ids for row in found], [row.logprobs for row in found], wanted())


@pytest.mark.slow
def test_coded_pages_answer_alone_as_beside_others():
    """Int8 in pages: requests that wait for them find what each finds alone; the pool is bytes."""
    cache = PagedCache(page=16, pages=6, codec=Int8())
    engine, pieces = Engine(model(cache), window=128, rows=3, chunk=16, burst=4), {}
    for piece in engine.run([Ask(prompt=prompt, max_new=NEW) for prompt in PROMPTS[:3]]):
        pieces.setdefault(piece.number, []).extend(piece.ids)
    alone = [generate(model(cache), [prompt], max_new=NEW, chunk=16)[0].ids for prompt in PROMPTS[:3]]
    assert [pieces[n] for n in range(3)] == alone
    assert {x.dtype.name for x in jax.tree.leaves(engine._read.state["layers"][0].k)} == {"int8", "float32"}


@pytest.mark.parametrize("unroll", [1, pytest.param("all", marks=pytest.mark.slow)], ids=["stacked", "apart"])
def test_requests_wait_for_pages(unroll):
    """On a pool of six pages, of which the longest request takes five: it stands beside the shortest alone."""
    engine = Engine(model(PagedCache(page=16, pages=6), unroll), window=128, rows=3, chunk=16, burst=4)
    pieces, most, beside = {}, 0, set()
    for piece in engine.run([Ask(prompt=prompt, max_new=NEW) for prompt in PROMPTS]):
        ids, logprobs = pieces.setdefault(piece.number, ([], []))
        ids.extend(piece.ids), logprobs.extend(piece.logprobs)
        there = [row.number for row in engine._held if row is not None]
        most, beside = max(most, len(there)), beside | {n for n in there if 3 in there}
    same([pieces[n][0] for n in range(5)], [pieces[n][1] for n in range(5)], wanted())
    assert most == 2 and beside <= {3, 4}
    for state in jax.tree.leaves(engine._read, is_leaf=lambda x: isinstance(x, PagedState)):
        if isinstance(state, PagedState):
            assert (np.asarray(state.left) == 6).all() and not np.asarray(state.overflow).any()
    number = engine.submit(Ask(prompt=PROMPTS[3], max_new=NEW))
    for _ in range(5):
        engine.step()
    engine.cancel(number)
    found = list(engine.run([Ask(prompt=PROMPTS[0], max_new=NEW)]))
    assert [n for piece in found for n in piece.ids] == wanted()[0].ids


def test_what_never_fits_is_refused():
    small = model(PagedCache(page=16, pages=4))
    with pytest.raises(ValueError, match=r"pattern\[0\]\.mixer\.cache = PagedCache.*with room for 73 tokens in 1 rows"):
        Engine(small, window=128, rows=2).submit(Ask(prompt=PROMPTS[3], max_new=NEW))
    with pytest.raises(ValueError, match="with room for 109 tokens in 3 rows"):
        generate(small, [PROMPTS[0], PROMPTS[2], PROMPTS[1] + [1, 2, 3]], max_new=NEW)


@pytest.mark.slow
def test_heads_on_a_mesh():
    spec = model(PagedCache(page=16)).spec
    mesh = MeshSpec(tensor=2).build(jax.devices()[:2])
    with jax.set_mesh(mesh):
        graph, state = nnx.split(model(PagedCache(page=16)))
        placed = jax.device_put(nnx.to_pure_dict(state), parameter_shardings(state, spec.rules, mesh))
        nnx.replace_by_pure_dict(state, placed)
        found = generate(nnx.merge(graph, state), PROMPTS, max_new=NEW, chunk=16)
    assert [row.ids for row in found] == [row.ids for row in wanted()]
