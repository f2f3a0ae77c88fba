"""Keys in slots are turned as they should, by every rope, raw or rotated, coded or not: beside attention in float64."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Causal
from lcx.batch import TokenInfo, causal_info
from lcx.cache.cache import At
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Int8
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.parts import parts
from lcx.positions.frequencies import FrequencyRule
from lcx.positions.length_rule import LengthRule
from lcx.positions.rotate import rotate
from lcx.spec import edit

DIM, VALUE, SCALE, PASSES = 8, 6, 0.4, (9, 1, 9, 1)
LENGTH = sum(PASSES)

# Padding on the left and within; two documents, the second from within the second pass on.
SEGMENTS = np.asarray([[0] * 5 + [1] * 5 + [0] + [1] * 9, [1] * 12 + [2] * 8], np.int32)
INDEX = np.asarray(causal_info(SEGMENTS).index)
RULES = [(f"{cls.__name__}-{n}", spec) for cls in parts(FrequencyRule) for n, spec in enumerate(cls.examples())]
QUICK = ("DynamicNTK-0", "MRopePlusPlus-1")


def turned(x, positions, lengths, frequencies, side):
    """[T, H, D] rotated, pair by pair."""
    x, out = x.astype(np.float64), x.astype(np.float64)
    inv_freq, factor = np.asarray(frequencies.inv_freq, np.float64), np.asarray(frequencies.factor, np.float64)
    pairs = inv_freq.shape[-1]
    for t in range(len(x)):
        theta, times = inv_freq, factor
        if inv_freq.ndim == 2:
            row = int(np.clip(-(-(int(lengths[t]) - frequencies.first) // frequencies.step), 0, None))
            row = min(row, len(inv_freq) - 1 - (frequencies.kept > 0))
            row = len(inv_freq) - 1 if frequencies.kept and positions[t, 0] < frequencies.kept else row
            theta, times = inv_freq[row], np.broadcast_to(factor, len(inv_freq))[row]
        for c in range(pairs):
            a, b = (c, c + pairs) if frequencies.pairing == "half" else (2 * c, 2 * c + 1)
            place = positions[t, frequencies.axis[c] if positions.shape[1] > 1 else 0]
            grown = 1.0
            if frequencies.growth is not None:
                grown = np.exp((1 if side == "query" else -1) * frequencies.growth[c] * place)
            cos, sin = times * grown * np.cos(place * theta[c]), times * grown * np.sin(place * theta[c])
            out[t, :, a], out[t, :, b] = x[t, :, a] * cos - x[t, :, b] * sin, x[t, :, a] * sin + x[t, :, b] * cos
    return out


def coded(x):
    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.round(x / scale) * scale


def reference(q, k, v, positions, lengths, frequencies, end, start, cache, row):
    """What the queries of tokens `start` to `end` of a row find, float64. lengths: of every token, at this pass."""
    eight, raw = cache.codec == Int8(), cache.keys == "raw"
    turn = lambda x, side="key": turned(x, positions[:end], lengths[:end], frequencies, side)
    old = np.arange(end) < start  # those of the pass itself are met as they are
    pick = lambda x, y: np.where(old[:, None, None], x, y)
    whole = turn(k[:end])
    keys = whole if not eight else pick(turn(coded(k[:end].astype(np.float64))) if raw else coded(whole), whole)
    values = v[:end].astype(np.float64)
    values = pick(coded(values), values) if eight else values
    queries, group = turn(q[:end], "query")[start:], q.shape[1] // k.shape[1]
    out = np.zeros((end - start, q.shape[1], VALUE))
    for t in range(start, end):
        seen = (SEGMENTS[row, :end] == SEGMENTS[row, t]) & (INDEX[row, :end] <= INDEX[row, t]) & (SEGMENTS[row, t] != 0)
        for h in range(q.shape[1]) if seen.any() else ():
            logits = SCALE * keys[seen, h // group] @ queries[t - start, h]
            weights = np.exp(logits - logits.max())
            out[t - start, h] = weights @ values[seen, h // group] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("cache", "rule"))
def step(cache, rule, state, q, k, v, info):
    frequencies = rule.frequencies(DIM, LENGTH)
    state = cache.append(state, k, v, info, frequencies)
    asked = rotate(q, info.positions, frequencies, info.lengths)
    out, lse = cache.attend(state, asked, info, frequencies=frequencies, mask=Causal(), scale=SCALE)
    asked = Asked(q=asked, raw=q, out=out, lse=lse, info=info, output=jnp.ones((q.shape[2], VALUE, 5)))
    rule = Rule(mask=Causal(), scale=SCALE, softcap=None, bias=None)
    return cache.prune(state, asked, frequencies=frequencies, rule=rule), out


def drawn(name, rule):
    """A combination of what there is to choose, of that name's own."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if isinstance(rule, LengthRule):
        rule = edit(rule, "length_policy", str(rng.choice(["frozen", "growing"])))
    keys = "raw" if isinstance(rule, LengthRule) else str(rng.choice(["raw", "rotated"]))
    policy = [None, Evict(score=KeyNorm(), keep=LENGTH), Evict(score=KeyNorm(), keep=LENGTH, heads="shared")][rng.integers(3)]
    codec = [Plain(), Int8()][rng.integers(2)]
    heads, kv_heads = [(4, 2), (3, 1), (2, 2)][rng.integers(3)]
    axes = int(rng.choice([1, len(rule.sections)])) if rule.sections else 1
    return rng, rule, KVCache(keys=keys, policy=policy, codec=codec), heads, kv_heads, axes


@pytest.mark.parametrize(
    "name, rule",
    [pytest.param(*one, marks=() if one[0] in QUICK else pytest.mark.slow) for one in RULES],
    ids=[name for name, _ in RULES],
)
def test_a_pass_finds_what_float64_finds(name, rule):
    rng, rule, cache, heads, kv_heads, axes = drawn(name, rule)
    make = lambda *shape: rng.normal(size=(2, LENGTH, *shape)).astype(np.float32)
    q, k, v = make(heads, DIM), make(kv_heads, DIM), make(kv_heads, VALUE)
    positions = INDEX[..., None] if axes == 1 else rng.integers(0, 40, (2, LENGTH, axes))
    positions = np.where(SEGMENTS[..., None] != 0, positions, 0).astype(np.float32)
    frequencies, growing = rule.frequencies(DIM, LENGTH), getattr(rule, "length_policy", None) == "growing"
    state, start = cache.init(2, LENGTH, kv_heads, DIM, VALUE, jnp.float32, axes, At(heads=heads)), 0
    assert cache.policy is None or cache.policy.slots(LENGTH, 1.0) >= LENGTH
    for size in PASSES:
        end, part = start + size, slice(start, start + size)
        read = SEGMENTS[:, : end if growing else LENGTH]  # so far, or all
        lengths = (SEGMENTS[:, :, None] == read[:, None]).sum(axis=2) * (SEGMENTS != 0)
        info = TokenInfo(
            index=INDEX, order=INDEX, positions=positions, segments=SEGMENTS, roles=0 * INDEX, lengths=lengths.astype(np.int32)
        )
        info = jax.tree.map(lambda x, part=part: jnp.asarray(x[:, part]), info)
        state, out = step(cache, rule, state, *(jnp.asarray(x[:, part]) for x in (q, k, v)), info)
        for row in range(2):
            given = q[row], k[row], v[row], positions[row].astype(np.float64), lengths[row]
            wanted = reference(*given, frequencies, end, start, cache, row)
            np.testing.assert_allclose(out[row], wanted, atol=2e-5)
        start = end
    assert state.overflow.tolist() == [0, 0]
