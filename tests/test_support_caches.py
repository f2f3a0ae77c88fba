"""Caches that do not fit their model are refused when the config is built, in one sentence each."""

import jax
import jax.numpy as jnp
import pytest

from lcx.attention.mask import Causal, Sink, Window
from lcx.cache.codecs.groups import IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.paged import PagedCache
from lcx.cache.policies.budgets import Pyramid, Shares
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.kvzip import KVzip
from lcx.cache.policies.think import ThinK
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.ring import RingCache
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.q_filters import QFilters
from lcx.cache.scorers.snapkv import SnapKV
from lcx.cache.selectors.quest import Quest
from lcx.cache.selectors.squeezed import Squeezed
from lcx.memory.model_memory import ModelMemory
from lcx.memory.ttt_e2e import TTTE2E
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Mixer
from lcx.mixers.titans import TitansMAG
from lcx.mixers.transformer_xl import TransformerXL
from lcx.models.position_table import PositionTable
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules
from lcx.parts import parts
from lcx.positions.alibi import ALiBi
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.long_heads import LongHeads
from lcx.positions.self_extend import SelfExtend
from lcx.positions.xpos import XPos
from lcx.spec import SpecError, below, edit, edits
from lcx.support import broken
from lcx.support_table import base

MIXER = "model.pattern[0].mixer"
QUEST = Quest(budget=64)
FILTERS = next(iter(QFilters.examples()))
DUO = DuoAttention(gates=((0.1, 0.2), (0.3, 0.9)), streaming=0.5)
SNAP = Evict(score=SnapKV(), keep=0.5)
ZIP = KVCache(policy=KVzip(keep=0.5))


def refusals(cache, *more):
    return list(broken(edits(base(), [(f"{MIXER}.cache", cache), *more])))


@pytest.mark.parametrize(
    "cache, more, words",
    [
        (
            KVCache(policy=Evict(score=SnapKV(window=5000), keep=0.5)),
            [],
            f"{MIXER}.cache.policy reads the newest 5000 queries: expected at most the",
        ),
        (KVCache(), [(f"{MIXER}.distances", LongHeads(chunk=8, chunks=4))], "expected a DenseCache beside"),
        (KVCache(policy=SNAP), [(f"{MIXER}.distances", SelfExtend(group=2, window=4))], "has no single logit"),
        (KVCache(policy=Chelsea(keep=0.5)), [(f"{MIXER}.softcap", 5.0)], "weighs no tokens, such as Chelsea(mass='one')"),
        (KVCache(keys="raw", positions="slots"), [(f"{MIXER}.distance_bias", ALiBi())], "positions = 'slots': expected 'own'"),
        (
            KVCache(policy=Evict(score=ExpectedAttention(), keep=0.5)),
            [("model.rope", XPos())],
            "whose mean turn it does not know",
        ),
        (KVCache(), [("model.rope", DynamicNTK(original_length=8))], "cache.keys = 'rotated': expected 'raw'"),
        (KVCache(selector=QUEST), [(f"{MIXER}.distances", SelfExtend(group=2, window=4))], "keys that are turned for good"),
        (KVCache(selector=QUEST, keys="raw"), [("model.rope", DynamicNTK(original_length=8))], "turned for good"),
        (KVCache(selector=Squeezed()), [(f"{MIXER}.mask", Window(size=9))], "to be seen alike"),
        (KVCache(selector=Squeezed()), [(f"{MIXER}.distance_bias", ALiBi())], "to be seen alike"),
        (
            KVCache(selector=Squeezed()),
            [("mesh.context", 2), ("model.rules", Rules(sequence=(), slots=("context",)))],
            "mesh.context = 2: expected 1 beside",
        ),
        (
            KVCache(policy=Evict(score=KeyNorm(), keep=0.5, recent=40)),
            [],
            "policy.recent = 40: expected at most 32 with sinks = 0, what keep = 0.5 is of 64 tokens, or keep of at least 0.6",
        ),
        (KVCache(codec=IntGroups(group=3)), [], f"{MIXER}.cache.codec.group = 3: expected a divisor of a head's 8"),
        (KVCache(keys="raw", codec=KVQuant(calibration="reader")), [], "expected tables of this model"),
        (KVCache(policy=Evict(score=KeyNorm(), keep=8, layers=Pyramid())), [("model.periods", 2)], "expected 'all'"),
        (
            KVCache(policy=Evict(score=FILTERS, keep=8)),
            [(f"{MIXER}.distances", SelfExtend(group=2, window=4))],
            "no rotated keys",
        ),
        (KVCache(policy=Evict(score=FILTERS, keep=8)), [(f"{MIXER}.kv_heads", 4)], "numbers of layer 0 of this model"),
        (KVCache(policy=Evict(score=FILTERS, keep=8)), [("model.periods", 2)], "numbers of layer 1 of this model"),
        (KVCache(policy=DUO), [(f"{MIXER}.kv_heads", 4)], "4 heads of layer 0 of this model"),
        (KVCache(policy=DUO), [], "one row for each of the model's 1 layers"),
        (KVCache(policy=DUO), [("model.periods", 2)], "expected 'all', as each layer's"),
        (KVCache(policy=ThinK()), [("model.rope", DynamicNTK(original_length=8))], "cache.keys = 'rotated': expected 'raw'"),
        (
            KVCache(policy=WindowKV(keep=8)),
            [("model.periods", 6)],
            f"{MIXER}.cache.policy.layers.group = 8: expected a divisor of the model's 6 layers: one of 1, 2, 3, 6",
        ),
        (ZIP, [(f"{MIXER}.mask", Window(size=8))], "expected Causal() beside model.pattern[0].mixer.cache.policy"),
        (edit(ZIP, "keys", "raw"), [("model.rope", DynamicNTK(original_length=8))], "that no length changes beside"),
        (ZIP, [("model.position_table", PositionTable(rows=64))], "expected None beside model.pattern[0].mixer.cache.policy"),
        (ZIP, [(f"{MIXER}.sinks", "learned")], "no method says what they take of a second reading"),
        (ZIP, [(f"{MIXER}.distances", SelfExtend(group=2, window=4))], "has no single logit"),
        (KVCache(policy=Evict(score=KeyNorm(), keep=8, layers=Shares(values=(1.0, 2.0)))), [], "one for each of the model's 1"),
    ],
)
def test_refused(cache, more, words):
    found = refusals(cache, *more)
    assert any(words in sentence for sentence in found), found


MEMORIES = [memory for cls in parts(ModelMemory) for memory in list(cls.examples())[:1]]


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: type(memory).__name__)
@pytest.mark.parametrize("cache", [KVCache(), RingCache(size=64), PagedCache()], ids=["kv", "ring", "paged"])
def test_not_beside_a_memory(cache, memory):
    """TTT-E2E among them, which takes tokens out of a cache again."""
    found = refusals(cache, ("model.memory", memory))
    assert any("mixer.cache: expected a DenseCache beside model.memory" in sentence for sentence in found), found


def of_others():
    """Mixers that hold attention, each with the path of it."""
    for cls in parts(Mixer):
        for mixer in list(cls.examples())[:1]:
            paths = [path for path, part in below(mixer) if path and isinstance(part, Attention)]
            yield from (pytest.param(mixer, path, id=cls.__name__) for path in paths)


@pytest.mark.parametrize("mixer, path", [*of_others()])
def test_not_within_another_mixer(mixer, path):
    try:
        found = list(broken(edits(base(), [(MIXER, mixer), (f"{MIXER}.{path}.cache", KVCache())])))
    except SpecError as error:
        found = [str(error)]
    assert any(f"{path}" in sentence and "DenseCache" in sentence for sentence in found), found


def test_not_in_front_of_the_layers():
    found = refusals(DenseCache(), ("model.embed_mixer", edit(base().model.pattern[0].mixer, "cache", KVCache())))
    assert any("model.embed_mixer.cache: expected a DenseCache" in sentence for sentence in found), found


def test_a_ring_is_as_long_as_its_mask_reaches():
    window = (f"{MIXER}.mask", Window(size=8))
    for cache in (RingCache(), RingCache(size=8, keys="raw"), RingCache(size=9)):
        assert refusals(cache, window) == []
    assert refusals(RingCache(size=7), window) == [
        f"{MIXER}.cache.size = 7: expected at least 8, the tokens that {MIXER}.mask reaches, or None"
    ]
    for mask in (Causal(), Sink(size=1) | Window(size=8)):
        (sentence,) = refusals(RingCache(size=4096), (f"{MIXER}.mask", mask))
        assert sentence.startswith(f"{MIXER}.mask: expected one with a bound, such as Window(size=4096)")
    learns = (window, (f"{MIXER}.cache", RingCache()), ("model.memory", TTTE2E(chunk=16, suffix=1, hidden=32)))
    assert any("expected a DenseCache beside" in sentence for sentence in broken(edits(base(), learns)))
    mixer = TransformerXL(attention=Attention(heads=4, kv_heads=2, head_dim=8, rope="none"), segment=16, memory=16)
    with pytest.raises(SpecError, match="one whose cache is a DenseCache"):
        edits(mixer, [("attention.cache", RingCache(size=64))])


def test_pages_are_drawn_from_one_pool():
    assert refusals(PagedCache(page=16, pages=4), ("mesh", MeshSpec(tensor=2))) == []
    for axis, rules in (("data", Rules()), ("context", Rules(sequence=(), slots=("context",)))):
        found = refusals(PagedCache(), ("model.rules", rules), ("mesh", MeshSpec(**{axis: 2})))
        assert f"mesh.{axis} = 2: expected 1 beside {MIXER}.cache, a PagedCache, whose rows draw on one pool" in found
    assert refusals(PagedCache(page=16, pages=3)) == [
        f"{MIXER}.cache.pages = 3: expected at least 4, which a row of data.length takes"
    ]
    within = ("model.pattern[0].mixer", TitansMAG.examples()[0])
    changes = [within, ("model.pattern[0].mixer.attention.cache", PagedCache())]
    assert any("expected a DenseCache within another mixer" in sentence for sentence in broken(edits(base(), changes)))
    state, mesh = PagedCache().init(2, 8, 2, 8, 8, jnp.float32), MeshSpec(data=2).build(jax.devices()[:2])
    message = "expected another than a PagedCache, which has one pool"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
        PagedCache().placed(state, Rules())


def test_accepted():
    several = [("model.periods", 2), ("model.unroll", "all")]
    for cache in (
        KVCache(policy=Evict(score=SnapKV(), keep=8, layers=Pyramid())),
        KVCache(policy=DUO),
        KVCache(policy=WindowKV(keep=8, layers=Pyramid(beta=4.0, group=2))),
        KVCache(keys="raw", codec=KVQuant(codebook="uniform"), policy=Chelsea(keep=0.6, mass="one")),
    ):
        assert list(broken(edits(base(), [*several, (f"{MIXER}.cache", cache)]))) == []
