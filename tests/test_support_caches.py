"""Caches that do not fit their model are refused when the config is built, in one sentence each."""

import pytest

from lcx.cache.codecs.groups import IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Pyramid, Shares
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.snapkv import SnapKV
from lcx.cache.selectors.quest import Quest
from lcx.memory.rmt import RMT
from lcx.positions.alibi import ALiBi
from lcx.positions.dynamic_ntk import DynamicNTK
from lcx.positions.long_heads import LongHeads
from lcx.positions.self_extend import SelfExtend
from lcx.positions.xpos import XPos
from lcx.spec import edits
from lcx.support import broken
from lcx.support_table import base

MIXER = "model.pattern[0].mixer"
QUEST = Quest(budget=64)
SNAP = Evict(score=SnapKV(), keep=0.5)


def refusals(cache, *more):
    return list(broken(edits(base(), [(f"{MIXER}.cache", cache), *more])))


@pytest.mark.parametrize(
    "cache, more, words",
    [
        (KVCache(), [(f"{MIXER}.distances", LongHeads(chunk=8, chunks=4))], "expected a DenseCache beside"),
        (KVCache(policy=SNAP), [(f"{MIXER}.distances", SelfExtend(group=2, window=4))], "has no single logit"),
        (KVCache(policy=Chelsea(keep=0.5)), [(f"{MIXER}.softcap", 5.0)], "mass = 'counted': expected 'one'"),
        (KVCache(keys="raw", positions="slots"), [(f"{MIXER}.distance_bias", ALiBi())], "positions = 'slots': expected 'own'"),
        (
            KVCache(policy=Evict(score=ExpectedAttention(), keep=0.5)),
            [("model.rope", XPos())],
            "whose mean turn it does not know",
        ),
        (KVCache(), [("model.rope", DynamicNTK(original_length=8))], "cache.keys = 'rotated': expected 'raw'"),
        (KVCache(selector=QUEST), [(f"{MIXER}.distances", SelfExtend(group=2, window=4))], "keys that are turned for good"),
        (KVCache(selector=QUEST, keys="raw"), [("model.rope", DynamicNTK(original_length=8))], "turned for good"),
        (KVCache(codec=IntGroups(group=3)), [], "groups of 3 channels in heads of 8"),
        (KVCache(keys="raw", codec=KVQuant(calibration="reader")), [], "expected tables of this model"),
        (KVCache(policy=Evict(score=KeyNorm(), keep=8, layers=Pyramid())), [("model.periods", 2)], "expected 'all'"),
        (KVCache(policy=WindowKV(keep=8)), [], "expected a divisor of the model's 1 layers"),
        (KVCache(policy=Evict(score=KeyNorm(), keep=8, layers=Shares(values=(1.0, 2.0)))), [], "one for each of the model's 1"),
    ],
)
def test_refused(cache, more, words):
    found = refusals(cache, *more)
    assert any(words in sentence for sentence in found), found


def test_not_beside_a_memory():
    found = refusals(KVCache(), ("model.memory", next(iter(RMT.examples()))))
    assert any("expected a DenseCache beside model.memory" in sentence for sentence in found)


def test_accepted():
    several = [("model.periods", 2), ("model.unroll", "all")]
    for cache in (
        KVCache(policy=Evict(score=SnapKV(), keep=8, layers=Pyramid())),
        KVCache(policy=WindowKV(keep=8, layers=Pyramid(beta=4.0, group=2))),
        KVCache(keys="raw", codec=KVQuant(codebook="uniform"), policy=Chelsea(keep=0.5, mass="one")),
    ):
        assert list(broken(edits(base(), [*several, (f"{MIXER}.cache", cache)]))) == []
