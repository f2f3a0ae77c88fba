"""Chelsea beside a token-by-token NumPy form: who joins whom, what they become, how attention counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.chelsea import Chelsea
from tests.cache.driven import KV_HEADS, SCALE, passes, run


def by_hand(k, v, budget, chunk, sinks, recent):
    """(k, v, counts, places) of one head of one row."""
    tokens = [(k[n], v[n], 1.0, n) for n in range(len(k))]
    while len(tokens) > budget:
        excess, end = len(tokens) - budget, len(tokens) - recent
        chunks = [list(range(at, min(at + chunk, len(tokens)))) for at in range(sinks, len(tokens), chunk)]
        free = [[n for n in one if n < end] for one in chunks]
        links = -(-excess // max(1, sum(map(bool, free))))
        gone, sums = set(), {}
        for one, members in zip(chunks, free, strict=True):
            even, odd = one[0::2], one[1::2]
            even, odd = [n for n in even if n in members], [n for n in odd if n in members]
            unit = lambda n, tokens=tokens: tokens[n][0] / np.linalg.norm(tokens[n][0])
            found = [(max(float(unit(a) @ unit(b)) for b in odd), -a) for a in even if odd]
            for _, a in sorted(sorted(found, reverse=True)[: min(links, chunk // 2)], key=lambda pair: -pair[1]):
                if len(gone) < excess:
                    target = max(odd, key=lambda b, a=-a: float(unit(-a if a < 0 else a) @ unit(b)))
                    gone.add(-a)
                    sums.setdefault(target, []).append(-a)
        merged = []
        for n, token in enumerate(tokens):
            if n in gone:
                continue
            group = [token, *(tokens[a] for a in sums.get(n, []))]
            total = sum(one[2] for one in group)
            mean = lambda i, group=group, total=total: sum(one[i] * one[2] for one in group) / total
            merged.append((mean(0), mean(1), total, token[3]))
        tokens = merged
    return tokens


@pytest.mark.parametrize("budget, chunk", [(30, 8), (14, 6)])
def test_merged_as_by_hand(budget, chunk):
    policy = Chelsea(keep=budget, chunk=chunk, sinks=2, recent=5)
    given = list(passes([40]))
    state = run(KVCache(policy=policy, keys="raw"), given)
    _, k, v, _ = given[0]
    for b in range(2):
        for h in range(KV_HEADS):
            wanted = by_hand(np.asarray(k[b, :, h]), np.asarray(v[b, :, h]), budget, chunk, 2, 5)
            n = len(wanted)
            assert np.asarray(state.held.info.index)[b, h, :n].tolist() == [one[3] for one in wanted]
            for found, i in ((state.held.k, 0), (state.held.v, 1), (state.held.counts, 2)):
                np.testing.assert_allclose(np.asarray(found)[b, h, :n], np.stack([one[i] for one in wanted]), atol=2e-6)
            assert (np.asarray(state.held.info.segments)[b, h] != 0).sum() == n == budget


@pytest.mark.parametrize("mass", ["counted", "one"])
def test_a_mean_weighs_as_the_tokens_that_it_stands_for(mass):
    """exp(s) n of each slot, and exp(s) of the new token, in one softmax."""
    cache, given = KVCache(policy=Chelsea(keep=20, chunk=4, sinks=1, recent=4, mass=mass)), list(passes([40, 1]))
    found = []
    run(cache, given, each=lambda state, q, k, v, info, out, lse, before: found.append((state, q, k, v, info, out, lse)))
    held = found[0][0].held
    from lcx.positions.rotate import rotate
    from tests.cache.driven import FREQUENCIES

    _, q, k, v, info, out, lse = found[1]
    q, k = (np.asarray(rotate(x, info.positions, FREQUENCIES))[:, 0] for x in (q, k))
    there, counts = np.asarray(held.info.segments) != 0, np.asarray(held.counts)
    for b in range(2):
        for h in range(4):
            g = h // 2
            keys = np.concatenate([np.asarray(held.k)[b, g][there[b, g]], k[b, g : g + 1]])
            values = np.concatenate([np.asarray(held.v)[b, g][there[b, g]], np.asarray(v)[b, 0, g : g + 1]])
            weights = np.exp(SCALE * keys @ q[b, h])
            if mass == "counted":
                weights = weights * np.concatenate([counts[b, g][there[b, g]], [1.0]])
            np.testing.assert_allclose(lse[b, 0, h], np.log(weights.sum()), atol=3e-6)
            np.testing.assert_allclose(out[b, 0, h], weights @ values / weights.sum(), atol=3e-6)
    assert isinstance(held.k, jax.Array) and jnp.max(held.counts) > 1
