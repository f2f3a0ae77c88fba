"""Generation with every kind of KV cache: rows alone and together, seated by the engine, on a mesh, layers apart."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Pyramid
from lcx.cache.policies.cam import CaM
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.compactor import Compactor
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.snapkv import SnapKV
from lcx.cache.selectors.quest import Quest
from lcx.channels.glu import GLU
from lcx.data.tokenizers import ByteTokenizer
from lcx.inference.engine import Ask, Engine
from lcx.inference.generate import generate
from lcx.inference.language_model import LocalModel
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.spec import edit, edits
from lcx.training.placement import parameter_shardings

LAYER = Layer(mixer=Attention(heads=4, kv_heads=2, head_dim=8), channel=GLU(hidden=32))
MODEL = Decoder(vocab=264, width=32, pattern=(LAYER,), periods=2, unroll="all")
PROMPTS = [list(range(7, 7 + n)) for n in (40, 9, 25, 61)]
CACHES = {
    "kivi": KVCache(codec=KIVI(group=8, residual=8)),
    "snap": KVCache(policy=Evict(score=SnapKV(window=4), keep=16, every=4)),
    "h2o, int4": KVCache(codec=IntGroups(group=8), policy=Evict(score=Observed(), keep=0.5, every=8)),
    "pyramid, kvquant": KVCache(
        keys="raw",
        codec=KVQuant(codebook="uniform", bits=4),
        policy=Evict(score=ExpectedAttention(ahead=8, sinks=1), keep=16, every=4, layers=Pyramid(beta=2.0)),
    ),
    "quest": KVCache(codec=KIVI(group=8, residual=8), selector=Quest(page=32, budget=32, dense_layers=1)),
    "duo": KVCache(policy=DuoAttention(gates=((0.1, 0.2), (0.9, 0.3)), streaming=0.75, sinks=2, recent=6, every=4)),
    "compactor, int4": KVCache(
        keys="raw",
        codec=IntGroups(group=8),
        policy=Evict(score=Compactor(sketch=4, chunk=8, sinks=2, recent=2), keep=16, every=4),
    ),
    "cam": KVCache(policy=CaM(score=SnapKV(window=4), keep=16, every=4, window=4)),
    "windows": KVCache(policy=WindowKV(keep=12, suffix=4, window=4, every=4, layers=Pyramid(beta=4.0, group=2))),
}


@functools.cache
def model(name: str):
    plain = MODEL.build(rngs=nnx.Rngs(0))
    cache = DenseCache() if name == "dense" else KVCache() if name == "plain" else CACHES[name]
    return rebuild(plain, edit(MODEL, "pattern[0].mixer.cache", cache))


def ids(name, prompts, **options):
    return [row.ids for row in generate(model(name), prompts, max_new=10, chunk=16, **options)]


def test_all_tokens_as_they_are_answer_as_a_dense_cache():
    assert ids("plain", PROMPTS) == ids("dense", PROMPTS)


@pytest.mark.parametrize(
    "name",
    ["windows", *(pytest.param(name, marks=pytest.mark.slow) for name in CACHES if name not in ("windows", "snap"))],
)
def test_a_row_is_alone_with_its_cache(name):
    """Together with others, and seated between them in a state that served before."""
    together = ids(name, PROMPTS)
    assert ids(name, PROMPTS[2:3]) == together[2:3]
    if name not in ("windows", "duo"):
        return
    engine = Engine(model(name), window=128, rows=2, chunk=16, burst=4)
    found: dict[int, list[int]] = {}
    for piece in engine.run([Ask(prompt=prompt, max_new=10) for prompt in PROMPTS]):
        found[piece.number] = found.get(piece.number, []) + piece.ids
    assert [found[n] for n in range(len(PROMPTS))] == together


@pytest.mark.parametrize(
    "name, axis",
    [
        ("quest", "context"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in [("h2o, int4", "tensor"), ("snap", "context"), ("duo", "tensor"), ("compactor, int4", "tensor")]
        ),
    ],
)
def test_on_a_mesh_as_on_one_device(name, axis):
    """Layers scanned there, and apart on one."""
    rules = Rules(sequence=(), slots=("context",)) if axis == "context" else Rules()
    spec = edits(model(name).spec, [("rules", rules), ("unroll", 1)])
    mesh = MeshSpec(**{"data": 2, axis: 2}).build(jax.devices()[:4])
    wanted = generate(model(name), PROMPTS, max_new=6, chunk=16)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(rebuild(model(name), spec))
        placed = jax.device_put(nnx.to_pure_dict(state), parameter_shardings(state, spec.rules, mesh))
        nnx.replace_by_pure_dict(state, placed)
        found = generate(nnx.merge(graph, state), PROMPTS, max_new=6, chunk=16)
    assert [row.ids for row in found] == [row.ids for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["quest", *(pytest.param(name, marks=pytest.mark.slow) for name in ("kivi", "h2o, int4", "cam"))]
)
def test_layers_of_a_scan_as_layers_apart(name):
    scanned = rebuild(model(name), edit(model(name).spec, "unroll", 1))
    found = generate(scanned, PROMPTS, max_new=10, chunk=16)
    assert [row.ids for row in found] == ids(name, PROMPTS)


def test_an_answer_without_room_is_refused():
    spec = edit(MODEL, "pattern[0].mixer.cache", KVCache(policy=Evict(score=KeyNorm(), keep=8, every=4, scope="prefill")))
    with pytest.raises(ValueError, match=r"policy\.every = 4: expected at least 10"):
        generate(rebuild(model("dense"), spec), PROMPTS[:1], max_new=10)


def test_scores_come_through_the_cache():
    """A cache that holds all tokens, in slots that a policy chose, scores as a parallel pass does."""
    rows, starts = [PROMPTS[3][:60], PROMPTS[3][:50]], [25, 30]
    score = lambda model: LocalModel(model, ByteTokenizer(), window=128, chunk=32, step=32).logprobs(rows, starts)
    whole = edit(MODEL, "pattern[0].mixer.cache", KVCache(policy=Evict(score=KeyNorm(), keep=128)))
    for a, b in zip(score(rebuild(model("dense"), whole)), score(model("dense")), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
        np.testing.assert_array_equal(a.greedy, b.greedy)
