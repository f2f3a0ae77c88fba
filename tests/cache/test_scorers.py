"""Scorers and policies beside the peers' own code (tests/oracles/presses.py): what stays of the same 60 tokens."""

import dataclasses
import functools
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
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.fold import Fold
from lcx.cache.policies.windowkv import WindowKV
from lcx.cache.scorers.chunks import WholeChunks
from lcx.cache.scorers.critical import Critical
from lcx.cache.scorers.curdkv import CurDKV
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.key_difference import KeyDifference
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.lag import Lag
from lcx.cache.scorers.leverage import leverage
from lcx.cache.scorers.observed import Observed
from lcx.cache.scorers.recency import Recency
from lcx.cache.scorers.scorer import Asked, Rule, Scorer
from lcx.cache.scorers.snapkv import SnapKV
from lcx.cache.scorers.tova import TOVA
from lcx.parts import parts
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate

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


def kept(policy, golden, codec=None):
    """(state, places that each key head keeps) of the tokens of the golden arrays in one pass."""
    given = [jnp.asarray(golden[name], jnp.float32) for name in ("q", "k", "v", "output")]
    state = one_pass(KVCache(policy=policy, **({} if codec is None else {"codec": codec})), *given)
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


def test_lagging_scores_are_those_of_kvpress(golden):
    class Seen(Evict):
        def compress(self, now, slots):
            result = super().compress(now, slots)
            return dataclasses.replace(result, v=jnp.broadcast_to(self.score.score(now)[..., None], now.v.shape)[:, :, :slots])

    state, _ = kept(Seen(score=Lag(block=8, sinks=4), keep=N), golden)
    found, wanted = np.asarray(state.held.v)[0, :, :N, 0], golden["score/lag"]
    np.testing.assert_allclose(np.where(wanted < 1, found, 1), wanted, atol=1e-6)
    assert (found[wanted >= 1] >= 1).all()


def test_leverage_scores_are_those_of_kvpress(golden):
    k = jnp.swapaxes(jnp.asarray(golden["k"], jnp.float32), 1, 2)
    found = leverage(k, jnp.ones((1, 1, N), bool), jnp.asarray(golden["directions"], jnp.float32))
    np.testing.assert_allclose(found[0], golden["score/leverage"], rtol=2e-4)


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
