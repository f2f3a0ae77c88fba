"""The peak of a prefill through a compressed cache: what it holds, and what a pass needs, whatever the length."""

import pytest

from lcx.cache.codecs.groups import IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.snapkv import SnapKV
from lcx.inference.bench_caches import prefill_bytes
from lcx.mixers.attention import Attention
from lcx.spec import edits
from tests.inference.test_cached_generation import MODEL

CHUNK = 256
CODECS = {
    "int4": KVCache(codec=IntGroups()),
    "int8": KVCache(codec=Int8()),
    "KVQuant-3": KVCache(keys="raw", codec=KVQuant(codebook="uniform")),
}


def bytes_of(cache, length):
    mixer = Attention(heads=4, kv_heads=2, head_dim=64, cache=cache)
    return prefill_bytes(edits(MODEL, [("pattern[0].mixer", mixer), ("periods", 2)]), length, CHUNK)


@pytest.mark.parametrize("name", ["int4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8", "KVQuant-3"))])
def test_beside_codes_stands_a_pass(name):
    """Where spans are whole, four times the tokens need as much beside the state."""
    (small, beside), (large, beside_large) = (bytes_of(CODECS[name], length) for length in (4096, 16384))
    assert large > 3.5 * small
    assert beside_large < beside + 0.05 * (large - small)


@pytest.mark.slow
def test_a_policys_choice_takes_a_few_times_what_one_layer_keeps():
    """With 12 % kept the peak is less than the whole cache would take alone."""
    dense = bytes_of(DenseCache(), 16384)[0]
    state, beside = bytes_of(KVCache(policy=Evict(score=SnapKV(), keep=0.12)), 16384)
    assert state < 0.14 * dense and state + beside < dense
