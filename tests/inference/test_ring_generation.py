"""Generation where local layers hold a ring: the answers of a dense cache, alone, seated by the engine, on a mesh."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Chunk, Window
from lcx.cache.dense import DenseCache
from lcx.cache.ring import RingCache
from lcx.channels.glu import GLU
from lcx.inference.engine import Ask, Engine
from lcx.inference.generate import generate
from lcx.mixers.attention import Attention
from lcx.mixers.infini_attention import InfiniAttention
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.titans import TitansMAG
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.self_extend import SelfExtend
from lcx.spec import edits
from lcx.training.placement import parameter_shardings

LOCAL = Attention(heads=4, kv_heads=2, head_dim=8, mask=Window(size=12), sinks="learned")
LAYERS = tuple(Layer(mixer=mixer, channel=GLU(hidden=32)) for mixer in (LOCAL, Attention(heads=4, kv_heads=2, head_dim=8)))
MODEL = Decoder(vocab=64, width=32, pattern=LAYERS, periods=1, unroll="all")
PROMPTS = [[(7 * n + 3 * i) % 64 for i in range(n)] for n in (40, 5, 25, 61)]
MIXER, CACHE = "pattern[0].mixer", "pattern[0].mixer.cache"
GROWING = DynamicNTK(original_length=16, length_policy="growing")


@functools.cache
def model(*changes):
    changed = edits(MODEL, [(path, part) for path, part in changes if path != CACHE])
    return rebuild(changed.build(rngs=nnx.Rngs(0)), edits(changed, [pair for pair in changes if pair[0] == CACHE]))


def answers(model, prompts=PROMPTS):
    return generate(model, prompts, max_new=20, chunk=16)


def same(found, wanted):
    assert [row.ids for row in found] == [row.ids for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "changes, keys",
    [
        ((), "rotated"),
        pytest.param((("rope", GROWING),), "raw", marks=pytest.mark.slow, id="growing"),
        pytest.param(((f"{MIXER}.distances", SelfExtend(group=2, window=4)),), "raw", marks=pytest.mark.slow, id="self-extend"),
    ],
)
def test_a_window_in_a_ring_answers_as_in_a_dense_cache(changes, keys):
    dense = (("pattern[1].mixer.cache", DenseCache(keys=keys)), (CACHE, DenseCache(keys=keys)))
    wanted = answers(model(*changes, *dense))
    found = model(*changes, dense[0], (CACHE, RingCache(keys=keys)))
    same(answers(found), wanted)
    if not changes:
        same(answers(found, PROMPTS[2:3]), wanted[2:3])
        engine, pieces = Engine(found, window=128, rows=2, chunk=16, burst=4), {}
        for piece in engine.run([Ask(prompt=prompt, max_new=20) for prompt in PROMPTS]):
            ids, logprobs = pieces.setdefault(piece.number, ([], []))
            ids.extend(piece.ids), logprobs.extend(piece.logprobs)
        for n, row in enumerate(wanted):
            assert pieces[n][0] == row.ids
            np.testing.assert_allclose(pieces[n][1], row.logprobs, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mixer",
    [
        InfiniAttention(attention=Attention(heads=4, kv_heads=2, head_dim=8, mask=Chunk(size=8))),
        TitansMAG(attention=LOCAL, memory=NeuralMemory(heads=2, head_dim=8, chunk=4, expand=2)),
    ],
    ids=["infini", "titans"],
)
def test_within_a_mixer_that_adds_a_memory(mixer):
    pattern = (Layer(mixer=mixer, channel=GLU(hidden=32)),)
    built = edits(MODEL, [("pattern", pattern)]).build(rngs=nnx.Rngs(0))
    ring = edits(built.spec, [("pattern[0].mixer.attention.cache", RingCache())])
    same(answers(rebuild(built, ring)), answers(built))


@pytest.mark.parametrize("axis", [pytest.param("tensor", marks=pytest.mark.slow), "context"])
def test_on_a_mesh_as_on_one_device(axis):
    rules = Rules(sequence=(), slots=("context",)) if axis == "context" else Rules()
    spec = edits(MODEL, [(CACHE, RingCache()), ("rules", rules)])
    mesh = MeshSpec(**{"data": 2, axis: 2}).build(jax.devices()[:4])
    wanted = answers(model())
    with jax.set_mesh(mesh):
        graph, state = nnx.split(rebuild(model(), spec))
        placed = jax.device_put(nnx.to_pure_dict(state), parameter_shardings(state, spec.rules, mesh))
        nnx.replace_by_pure_dict(state, placed)
        found = answers(nnx.merge(graph, state))
    assert [row.ids for row in found] == [row.ids for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
