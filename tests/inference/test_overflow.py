"""Tokens that find no slot are an error that names the row and the layer, never an answer without them."""

import functools
import re

import numpy as np
import pytest
from flax import nnx

from lcx.attention.mask import Window
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.cache.paged import PagedCache
from lcx.cache.policies.evict import Evict
from lcx.cache.ring import RingCache
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.channels.glu import GLU
from lcx.inference import streamed
from lcx.inference.generate import answer
from lcx.inference.overflow import CacheOverflow
from lcx.inference.reading import feed, nothing_read
from lcx.inference.shapes import right_padded
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.spec import edits

LOCAL = Attention(heads=4, kv_heads=2, head_dim=8, mask=Window(size=8), cache=RingCache())
LAYERS = tuple(Layer(mixer=mixer, channel=GLU(hidden=32)) for mixer in (LOCAL, Attention(heads=4, kv_heads=2, head_dim=8)))
MODEL = Decoder(vocab=64, width=32, pattern=LAYERS, periods=2)
PROMPTS = [[(7 * n + 3 * i) % 64 for i in range(n)] for n in (6, 21)]
MORE = "and 1 more of its caches: expected rows of fewer tokens, or"
EVICTING = Evict(score=KeyNorm(), keep=10, scope="prefill", every=3)
FULL = {
    "dense": (DenseCache(), 24, f"row 1: 2 tokens found no slot in layer 1 (DenseState) {MORE} a state"),
    "paged": (PagedCache(page=8, pages=4), 64, "row 0: 3 tokens found no slot in layer 1 (PagedState) and 1 more"),
    "kv": (KVCache(), 24, f"row 1: 2 tokens found no slot in layer 1 (KVState) {MORE}, behind a policy"),
    "evicting": (KVCache(policy=EVICTING), 64, f"row 1: 2 tokens found no slot in layer 1 (KVState) {MORE}, behind a policy"),
}


@functools.cache
def model(cache=DenseCache(), unroll=1):
    built = MODEL.build(rngs=nnx.Rngs(0))
    return rebuild(built, edits(MODEL, [("pattern[1].mixer.cache", cache), ("unroll", unroll)]))


def read_in(model, prompts, room, rows=4):
    """Rows that were told that they may grow, in a state for `room` tokens."""
    none = np.zeros(rows, np.int32)
    tokens, segments = right_padded(prompts, 32, rows, 64)
    return feed(model, tokens, segments, nothing_read(model, rows, room, none + 64, none.astype(np.float32), none))


def fed_on(model, read, document):
    """With two tokens of a document behind each of two rows, one after the other."""
    for token in (3, 4):
        read = feed(model, np.full((4, 1), token), np.asarray([[document]] * 2 + [[0]] * 2), read)
    return read


@pytest.mark.parametrize(
    "name, unroll",
    [
        ("dense", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [*((name, 1) for name in FULL), ("dense", "all")][1:]),
    ],
)
def test_an_answer_without_its_tokens_is_an_error(name, unroll, monkeypatch):
    """Of 6 and 21 tokens, 2 fed behind them and 3 of an answer; of 4 pages of 8 the second row takes three."""
    monkeypatch.setattr(PagedCache, "fits", lambda self, lengths: True)
    cache, room, said = FULL[name]
    given = model(cache, unroll)
    with pytest.raises(CacheOverflow, match=re.escape(said)):
        answer(given, fed_on(given, read_in(given, PROMPTS, room), 1), max_new=3)


def test_documents_that_come_back_to_a_ring_are_an_error():
    read = lambda document: fed_on(model(), read_in(model(), [PROMPTS[0], PROMPTS[1][:19]], 24), document)
    answer(model(), read(1), max_new=3)
    with pytest.raises(
        CacheOverflow, match=r"row 0: 3 tokens .* layer 0 \(RingState\).*documents of a row one after the other"
    ):
        answer(model(), read(2), max_new=3)


@pytest.mark.slow
def test_log_probabilities_without_their_tokens_are_an_error(monkeypatch):
    rows, room = [[*prompt, 1, 2, 3] for prompt in PROMPTS], 64
    monkeypatch.setattr(streamed, "prefill", lambda model, prompts, *_: read_in(model, prompts, room, 2))
    score = lambda: streamed.streamed_logprobs(model(), rows, [6, 21], size=2, chunk=32, step=4)
    score()
    room = 22
    with pytest.raises(CacheOverflow, match=re.escape("row 1: 2 tokens found no slot in layer 1 (DenseState) and 1 more")):
        score()
