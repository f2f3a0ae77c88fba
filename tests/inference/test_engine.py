"""Requests that come and go get the tokens of `generate`, whatever stands beside them, and nothing is compiled anew."""

import numpy as np
import pytest

from lcx.inference.decoding import decode
from lcx.inference.engine import Ask, Engine
from lcx.inference.generate import generate
from lcx.inference.overflow import CacheOverflow
from lcx.inference.reading import feed
from lcx.inference.requests import WindowOverflow
from lcx.inference.sampling import Sampling

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 250, n).tolist() for n in (3, 30, 1, 17, 9, 21)]
HOT = Sampling(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01)
KINDS = [(5, Sampling(), 0), (12, HOT, 2), (7, HOT, 0), (1, Sampling(), 0), (9, HOT, 3), (4, Sampling(), 0)]
ASKS = [
    Ask(prompt, max_new=new, sampling=sampling, seed=seed, top=top)
    for seed, (prompt, (new, sampling, top)) in enumerate(zip(PROMPTS, KINDS, strict=True))
]


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, window=64, rows=2, chunk=8, burst=4)


def collected(pieces, count):
    ids, logprobs, tops, finish = ([[] for _ in range(count)] for _ in range(4))
    for piece in pieces:
        ids[piece.number] += piece.ids
        logprobs[piece.number] += piece.logprobs
        tops[piece.number] += piece.tops
        finish[piece.number].append(piece.finish)
    return ids, logprobs, tops, finish


def test_tokens_are_those_of_generate(model, engine):
    """Six requests for two rows, of other lengths, limits, seeds and samplings."""
    ids, logprobs, tops, finish = collected(engine.run(ASKS), len(ASKS))
    for n, ask in enumerate(ASKS):
        (wanted,) = generate(model, [ask.prompt], max_new=ask.max_new, sampling=ask.sampling, seeds=[ask.seed], chunk=32)
        assert ids[n] == wanted.ids
        np.testing.assert_allclose(logprobs[n], wanted.logprobs, atol=1e-5)
        assert finish[n][-1] == "length" and set(finish[n][:-1]) <= {None}
        assert [len(top) for top in tops[n]] == [ask.top] * ask.max_new
        for top, token, logprob in zip(tops[n], ids[n], logprobs[n], strict=True):
            assert [x for _, x in top] == sorted((x for _, x in top), reverse=True)
            assert dict(top).get(token, logprob) == pytest.approx(logprob)
    assert not engine.busy


def test_a_request_that_finds_no_slots_fails_alone(model, engine, monkeypatch):
    """As if rows held more than they do; the next request in its row is answered."""
    monkeypatch.setattr(engine, "window", 2 * engine.window)
    asks, pieces = (
        [Ask(prompt, max_new=9) for prompt in (PROMPTS[0], 2 * PROMPTS[5] + PROMPTS[3][:16], PROMPTS[3], PROMPTS[4])],
        [],
    )
    with pytest.raises(CacheOverflow, match=r"row 0: 2 tokens found no slot in layer 0 \(DenseState\) and 1 more"):
        for piece in engine.run(asks):
            pieces.append(piece)
    ids, _, _, finish = collected(pieces, 4)
    wanted = generate(model, [asks[n].prompt for n in (0, 2, 3)], max_new=9, chunk=32)
    assert [ids[n] for n in (0, 2, 3)] == [row.ids for row in wanted]
    assert finish[1][-1] == "overflow" and len(ids[1]) == 4 and not engine.busy


def test_a_stop_ends_a_request_alone(engine):
    free, _, _, _ = collected(engine.run(ASKS[:2]), 2)
    stop = free[1][6]
    asks = [Ask(ask.prompt, ask.max_new, ask.sampling, ask.seed, (stop, 999)) for ask in ASKS[:2]]
    cut, _, _, finish = collected(engine.run(asks), 2)
    assert cut[1] == free[1][: free[1].index(stop)] and finish[1][-1] == "stop"
    assert cut[0] == free[0][: free[0].index(stop) if stop in free[0] else 5]


def test_what_is_cancelled_is_forgotten(engine):
    first, second = engine.submit(ASKS[1]), engine.submit(ASKS[0])
    engine.step()
    engine.cancel(first)
    pieces = []
    while engine.busy:
        pieces += engine.step()
    assert {piece.number for piece in pieces} == {second}


def test_nothing_is_compiled_for_prompts_of_other_lengths(model):
    engine = Engine(model, window=64, rows=2, chunk=8, burst=4)
    asks = [Ask(RNG.integers(0, 250, n).tolist(), max_new=3) for n in (3, 20)]
    list(engine.run(asks))
    before = feed._cache_size(), decode._cache_size()
    list(engine.run([Ask(RNG.integers(0, 250, n).tolist(), max_new=5, sampling=HOT) for n in (1, 5, 8, 9, 16, 31)]))
    assert (feed._cache_size(), decode._cache_size()) == before


@pytest.mark.parametrize(
    ("ask", "kind", "message"),
    [
        (Ask([1] * 60, max_new=5), WindowOverflow, "prompt of 60 tokens"),
        (Ask([], max_new=5), ValueError, "prompt of 0 tokens"),
        (Ask([1], max_new=0), ValueError, "max_new = 0"),
        (Ask([5000], max_new=1), ValueError, "token id 5000"),
        (Ask([1], max_new=1, seed=-1), ValueError, "seed = -1"),
        (Ask([1], max_new=1, top=5000), ValueError, "top = 5000"),
    ],
)
def test_what_cannot_be_served_is_refused(engine, ask, kind, message):
    with pytest.raises(kind, match=message):
        engine.submit(ask)
    assert not engine.busy
