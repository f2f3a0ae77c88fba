"""Scorers and policies beside the peers' own code (tests/oracles/presses.py): what stays of the same 60 tokens."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Causal
from lcx.batch import causal_info
from lcx.cache.cache import At
from lcx.cache.codecs.scaled import Int8
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.budgets import Even, Pyramid, Shares
from lcx.cache.policies.cam import CaM
from lcx.cache.policies.duo_attention import DuoAttention
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.fold import Fold
from lcx.cache.policies.simlayerkv import SimLayerKV
from lcx.cache.policies.think import ThinK
from lcx.cache.policies.top import top
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.chunks import EachChunk, WholeChunks
from lcx.cache.scorers.compactor import Compactor
from lcx.cache.scorers.critical import Critical
from lcx.cache.scorers.curdkv import CurDKV
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.key_difference import KeyDifference
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.lag import Lag
from lcx.cache.scorers.leverage import leverage
from lcx.cache.scorers.non_causal import NonCausal, within_chunks
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.q_filters import QFilters
from lcx.cache.scorers.recency import Recency
from lcx.cache.scorers.scorer import Asked, Rule, Scored, Scorer
from lcx.cache.scorers.snapkv import SnapKV
from lcx.cache.scorers.tova import TOVA
from lcx.parts import parts
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from tests.cache.driven import KV_HEADS, held_indices, passes, run

N, H, K, D, KEPT, WINDOW = 60, 4, 2, 8, 24, 6
RULE = Rule(mask=Causal(), scale=D**-0.5, softcap=None, bias=None)
FREQUENCIES = Rope().frequencies(D, N)
PRESSES = {
    "norm": KeyNorm(),
    "difference": KeyDifference(),
    "snapkv": SnapKV(window=WINDOW, kernel=5),
    "tova": TOVA(),
    "observed": Observed(by="mean"),
    "expected": ExpectedAttention(ahead=32, sinks=4),
    "cur": CurDKV(window=16, sinks=4),
    "non_causal": NonCausal(chunk=20),
}


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "oracles" / "golden" / "presses.npz") as file:
        return {name: file[name] for name in file.files}


@functools.partial(jax.jit, static_argnames="cache")
def one_pass(cache, q, k, v, output):
    info = causal_info(jnp.ones((1, N), jnp.int32))
    state = cache.init(1, N, K, D, D, jnp.float32, at=At(heads=H))
    turned = rotate(q, info.positions, FREQUENCIES)
    given = cache.append(state, k, v, info, FREQUENCIES)
    out, lse = cache.attend(given, turned, info, mask=Causal(), scale=RULE.scale, frequencies=FREQUENCIES)
    asked = Asked(q=turned, raw=q, out=out, lse=lse, info=info.filled(), output=output)
    return cache.prune(given, asked, frequencies=FREQUENCIES, rule=RULE)


def kept(policy, golden, codec=None, keys="rotated"):
    """(state, places that each key head keeps) of the tokens of the golden arrays in one pass."""
    given = [jnp.asarray(golden[name], jnp.float32) for name in ("q", "k", "v", "output")]
    state = one_pass(KVCache(policy=policy, keys=keys, **({} if codec is None else {"codec": codec})), *given)
    index, there = (np.asarray(x)[0] for x in (state.held.info.index, state.held.info.segments != 0))
    return state, [sorted(i[t].tolist()) for i, t in zip(index, there, strict=True)]


@pytest.mark.parametrize("name", PRESSES)
def test_heads_keep_what_kvpress_keeps(name, golden):
    _, found = kept(Evict(score=PRESSES[name], keep=KEPT), golden)
    assert found == golden[f"kept/{name}"].tolist()


def test_a_codec_changes_no_choice(golden):
    _, found = kept(Evict(score=PRESSES["snapkv"], keep=KEPT), golden, Int8())
    assert found == golden["kept/snapkv"].tolist()


def test_sinks_and_newest_are_those_of_streaming(golden):
    _, found = kept(Evict(score=Recency(), keep=KEPT, sinks=4), golden)
    assert found == golden["kept/streaming"].tolist()


def test_values_that_change_the_output_stay_with_critical(golden):
    _, found = kept(Evict(score=Critical(of=dataclasses.replace(PRESSES["expected"], values="left out")), keep=KEPT), golden)
    assert found == golden["kept/critical"].tolist()


def test_whole_chunks(golden):
    _, found = kept(Evict(score=WholeChunks(of=KeyNorm(), size=20), keep=KEPT), golden)
    assert found == golden["kept/chunks"].tolist()


@pytest.mark.parametrize("wrapper", [WholeChunks, EachChunk, Critical], ids=lambda part: part.__name__)
def test_where_all_tokens_have_to_stay_the_newest_do(wrapper):
    """A window that is longer than what was read."""
    score = wrapper(of=SnapKV(window=64), **({} if wrapper is Critical else {"size": 4}))
    state = run(KVCache(policy=Evict(score=score, keep=8)), passes([12]))
    assert held_indices(KVCache(), state) == [[list(range(4, 12))] * KV_HEADS] * 2


def test_heads_share_one_budget_as_with_adakv(golden):
    _, found = kept(Evict(score=PRESSES["snapkv"], keep=KEPT, heads="adaptive", safe=0.2, spread=2.0), golden)
    assert found == [np.flatnonzero(mask).tolist() for mask in golden["masked/adakv"]]
    assert sum(map(len, found)) == 2 * KEPT


def test_values_are_folded_as_kvpress_merges_them(golden):
    state, found = kept(Fold(score=KeyNorm(), keep=KEPT), golden)
    assert found == golden["kept/norm"].tolist()
    np.testing.assert_allclose(state.held.v[0, :, :KEPT], golden["merged/values"], atol=2e-6)


@pytest.mark.parametrize("task", ["localization", "aggregation"])
def test_windows_are_those_of_the_authors(task, golden):
    policy = WindowKV(keep=24, task=task, window=8, suffix=WINDOW, layers=Even())
    _, found = kept(policy, golden)
    assert found == [golden[f"windows/{task}"].tolist()]


def scores(scorer, golden):
    """[K, N] of all tokens in one pass."""

    class Seen(Evict):
        def compress(self, now, slots):
            result = super().compress(now, slots)
            return dataclasses.replace(result, v=jnp.broadcast_to(self.score.score(now)[..., None], now.v.shape)[:, :, :slots])

    state, _ = kept(Seen(score=scorer, keep=N), golden, keys="raw" if scorer.raw else "rotated")
    return np.asarray(state.held.v)[0, :, :N, 0]


def test_lagging_scores_are_those_of_kvpress(golden):
    found, wanted = scores(Lag(block=8, sinks=4), golden), golden["score/lag"]
    np.testing.assert_allclose(np.where(wanted < 1, found, 1), wanted, atol=1e-6)
    assert (found[wanted >= 1] >= 1).all()


def test_leverage_scores_are_those_of_kvpress(golden):
    k = jnp.swapaxes(jnp.asarray(golden["k"], jnp.float32), 1, 2)
    found = leverage(k, jnp.ones((1, 1, N), bool), jnp.asarray(golden["directions"], jnp.float32))
    np.testing.assert_allclose(found[0], golden["score/leverage"], rtol=2e-4)


def test_attention_within_chunks_is_that_of_kvpress(golden):
    """Up to its last mean and deviation; of a last chunk that is not full, what its class gives of that chunk alone."""
    found, wanted = scores(NonCausal(chunk=20), golden), golden["score/non_causal/20"]
    np.testing.assert_allclose((found - found.mean()) / found.std(ddof=1), wanted, atol=2e-5)
    found = scores(NonCausal(chunk=25, kernel=1), golden) / np.linalg.norm(golden["v"][0], axis=-1).T
    np.testing.assert_allclose(found, golden["score/non_causal/25"], atol=2e-5)


def test_compactor(golden):
    class Given(Compactor):
        def directions(self, now):
            return jnp.asarray(golden["directions"], jnp.float32)

    given = Given(sketch=6, chunk=16, blend=0.6)
    found, wanted = scores(given, golden)[:, 8:-4], golden["score/compactor"][:, 8:-4]
    np.testing.assert_allclose(found, wanted, atol=5e-4)
    _, found = kept(Evict(score=dataclasses.replace(given, blend=None), keep=KEPT), golden, keys="raw")  # of 60 0.6 go
    assert found == golden["kept/compactor"].tolist()


def numbers(x):
    return tuple(map(numbers, x)) if np.ndim(x) else float(x)


def test_directions_of_queries(golden, tmp_path):
    np.savez(tmp_path / "d.npz", directions=golden["filters"][None])
    held, file = numbers(golden["filters"][None]), str(tmp_path / "d.npz")
    np.testing.assert_array_equal(QFilters(directions=held).tables(0, K, D), QFilters(directions=file).tables(0, K, D))
    _, found = kept(Evict(score=QFilters(directions=file), keep=KEPT), golden)
    assert found == golden["kept/filters"].tolist()


def test_a_lazy_layer_keeps_first_and_newest(golden):
    """kvpress leaves the last query's own token out, and of 12 newest tokens keeps 11; the authors keep what they judge by."""
    shares = golden["lazy/shares"]
    mass = shares[:4].sum() + shares[-11:].sum() + 1 - shares.sum()
    for threshold, lazy in ((mass - 1e-4, True), (mass + 1e-4, False)):
        _, found = kept(SimLayerKV(threshold=float(threshold), sinks=4, recent=12), golden)
        assert found == [[0, 1, 2, 3, 48, *golden["kept/lazy"][4:]] if lazy else [*range(N)]]


def test_streaming_heads(golden, tmp_path):
    gates = golden["gates"]
    (tmp_path / "g.json").write_text(json.dumps(gates.tolist()))
    np.savetxt(tmp_path / "g.tsv", gates, delimiter="\t")
    np.savez(tmp_path / "g.npz", gates=gates)
    for held in (numbers(gates), *(str(tmp_path / f"g.{kind}") for kind in ("json", "tsv", "npz"))):
        policy = DuoAttention(gates=held, sinks=4, recent=12)
        for layer, mask in enumerate(golden["masked/duo"]):
            assert policy.tables(layer, K, D).tolist() == (~mask.all(axis=1)).tolist()
    first = DuoAttention(gates=numbers(np.where(golden["masked/duo"].all(axis=2), 0.9, 0.1)[:1]), sinks=4, recent=12)
    _, found = kept(first, golden)
    assert found == [np.flatnonzero(mask).tolist() for mask in golden["masked/duo"][0]]


def test_channels_that_are_left_out(golden):
    state, found = kept(ThinK(channels=0.4, window=WINDOW), golden)
    assert found == [[*range(N)]] * K
    np.testing.assert_allclose(jnp.moveaxis(state.held.k[0, :, :N], 0, 1), golden["think/keys"], atol=2e-5)
    assert (np.asarray(state.held.k[0, :, :N]) == 0).all(axis=1).sum() == 3 * K
    state, found = kept(ThinK(channels=0.4, window=WINDOW, score=KeyNorm(), keep=KEPT), golden)
    assert found == golden["kept/norm"].tolist()
    np.testing.assert_allclose(state.held.k[0, :, :KEPT], golden["think/norm"], atol=2e-5)


def test_values_are_merged_into_those_behind_as_in_cam(golden):
    class Given(CaM):
        def draws(self, now):
            drawn = jnp.asarray(golden["uniform"], jnp.float32)[None]
            return jnp.pad(drawn, ((0, 0), (0, 0), (0, now.k.shape[2] - N)))

    state, found = kept(Given(score=KeyNorm(), keep=KEPT, window=5), golden)
    assert found == [golden["kept/cam"].tolist()]
    np.testing.assert_allclose(state.held.v[0, :, :KEPT], golden["cam/values"], atol=2e-5)


def test_chunks_of_tokens_that_are_there():
    """Padding anywhere and two documents: each token's neighbours are those of its chunk and document, on both sides."""
    rng = np.random.default_rng(3)
    segments = np.asarray([[0, 0, 1, 1, 1, 0, 1, 2, 2, 2, 0]], np.int32)
    q, k = rng.normal(size=(1, 11, H, D)), rng.normal(size=(1, 11, K, D))
    info = causal_info(jnp.asarray(segments))
    q32 = jnp.asarray(q, jnp.float32)
    asked = Asked(q=q32, raw=q32, out=q32, lse=q32[..., 0], info=info, output=jnp.zeros((H, D, 1)))
    keys = jnp.asarray(np.concatenate([np.ones((1, 2, K, D)), k], axis=1), jnp.float32)
    k_info = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (2, 0)) + ((0, 0),) * (x.ndim - 2))[:, None], info)
    found = within_chunks(asked, jnp.moveaxis(keys, 2, 1), k_info, RULE, new=11, size=5)
    wanted = np.ones((K, 13))
    wanted[:, :2] = 0
    for places in ([2, 3, 4, 6], [7], [8, 9]):  # of chunks 2 3 4 6 7 and 8 9
        for h in range(K):
            s = np.einsum("tgd,sd->gts", q[0, places, 2 * h : 2 * h + 2], k[0, places, h]) * RULE.scale
            p = np.exp(s) / np.exp(s).sum(axis=-1, keepdims=True)
            wanted[h, np.asarray(places) + 2] = p.sum(axis=1).mean(axis=0)
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    alone = within_chunks(asked, jnp.moveaxis(keys, 2, 1), k_info, RULE, new=0, size=5)
    assert not np.asarray(alone).any()


@pytest.mark.parametrize("score", [KeyNorm(), Critical(of=KeyNorm()), WholeChunks(of=KeyNorm()), EachChunk(of=KeyNorm())])
@pytest.mark.parametrize("shape", [(K, N), (1, K, 1), (1, 1, N)])
def test_scores_of_another_shape_are_refused(score, shape, golden, monkeypatch):
    monkeypatch.setattr(KeyNorm, "score", lambda self, now: np.ones(shape))
    given = [golden[name] for name in ("q", "k", "v", "output")]
    cache = KVCache(policy=Evict(score=score, keep=KEPT + 1), keys="raw")
    said = rf"KeyNorm\.score gave {re.escape(str(shape))}: expected \[B, K, N\] = \(1, {K}, \d+\), a number for each"
    with pytest.raises(ValueError, match=said):
        one_pass(cache, *map(jnp.float32, given))


def test_budgets_of_layers(golden):
    """PyramidKV's integers are those of a line; WindowKV's step is rounded down, so groups between differ a little."""
    pyramid = [1024 * 0.25 * Pyramid(beta=20.0).share(n, 8) for n in range(8)]
    np.testing.assert_allclose(pyramid, golden["budgets/pyramid"], atol=0.5)
    windows = [128 * Pyramid(beta=14.0, group=4).share(n, 16) for n in range(16)]
    np.testing.assert_allclose(windows, golden["budgets/windowkv"], atol=2.0)
    assert sum(pyramid) == pytest.approx(8 * 256) and Shares(values=(1.0, 3.0)).share(1, 2) == 1.5


@pytest.mark.parametrize("cls", parts(Scorer), ids=lambda cls: cls.__name__)
def test_every_scorer_keeps_what_it_is_asked_to(cls, golden):
    given = [jnp.asarray(golden[name], jnp.float32) for name in ("q", "k", "v", "output")]
    policy = Evict(score=next(iter(cls.examples())), keep=KEPT)
    state = one_pass(KVCache(policy=policy, keys="raw"), *given)
    there = np.asarray(state.held.info.segments != 0)[0]
    assert (there.sum(axis=1) <= KEPT).all() and (there.sum(axis=1) > KEPT - 20).all()
    assert np.isfinite(np.asarray(state.held.v)).all()


@pytest.mark.parametrize("seed", range(4))
def test_top_is_the_head_of_a_stable_sort(seed):
    """Alike ones, both zeros, infinities and what is no number among them."""
    random = np.random.default_rng(seed)
    N, count = (int(n) for n in random.integers(1, 60, 2))
    strange = [0.0, -0.0, 1, 2, -3, 1e38, np.inf, -np.inf, np.nan, 1e-40]
    scores = (random.choice(strange, (2, 3, N)) if seed % 2 else random.normal(size=(2, 3, N))).astype(np.float32)
    budget = random.integers(0, N + 5, (2, 3)).astype(np.int32)
    index, there = map(np.asarray, top(jnp.asarray(scores), jnp.asarray(budget), count))
    for at in np.ndindex(2, 3):
        best = np.argsort(np.where(np.isnan(scores[at]), np.inf, -scores[at]), kind="stable")[: min(budget[at], count)]
        wanted = np.sort([n for n in best if scores[at][n] > -np.inf])
        np.testing.assert_array_equal(index[at][there[at]], wanted)
        assert there[at].shape == (count,) and there[at][: len(wanted)].all()


@pytest.mark.parametrize("at_once", [5, 7, 64])
def test_what_queries_looked_at_some_tokens_at_a_time(at_once):
    """As with all at once; a row with nothing, and one with fewer tokens than a part."""
    random = np.random.default_rng(0)
    B, W, N = 3, 3, 23
    of = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    held = np.array([23, 0, 4])
    info = causal_info(jnp.asarray(np.arange(N) < held[:, None], jnp.int32))
    newest = causal_info(jnp.ones((B, W), jnp.int32), start=jnp.full(B, 20))
    now = scored(of(B, K, N, D), of(B, W, H, D), jax.tree.map(lambda x: x[:, None], info), newest, held)
    np.testing.assert_allclose(now.looked(W, at_once), now.attention(W).sum(axis=3), atol=1e-6)


def scored(k, q, info, newest, held):
    nothing = dict.fromkeys([field.name for field in dataclasses.fields(Scored)])
    given = {"k": k, "raw": k, "v": k, "info": info, "count": jnp.asarray(held)[:, None], "newest": q, "newest_info": newest}
    return Scored(**nothing | given | {"seen": jnp.asarray(held), "budget": jnp.asarray(held), "rule": RULE})
