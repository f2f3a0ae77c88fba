"""Slots read as they are coded give what spans of decoded ones give."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.attention.mask import Causal, Sink, Window
from lcx.batch import causal_info
from lcx.cache.cache import At
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Int8
from lcx.cache.kv_cache import KVCache
from lcx.cache.layered import in_layers, of_layer
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.key_norm import KeyNorm
from lcx.cache.scorers.scorer import Asked, Rule
from lcx.positions.alibi import ALiBi
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.positions.xpos import XPos
from pallas_kernels.quantized_attention import op, tpu
from tests.cache.driven import HEADS, KV_HEADS, passes, run

EVICT = Evict(score=KeyNorm(), keep=40, every=24)
CACHES = {
    "as they are": KVCache(),
    "int8, heads of their own tokens": KVCache(codec=Int8(), policy=EVICT),
    "int4, merged and counted": KVCache(codec=IntGroups(group=2), policy=Chelsea(keep=40, every=24, sinks=1, recent=4)),
    "KIVI, raw": KVCache(codec=KIVI(bits=4, group=2, residual=2), keys="raw"),
    "KVQuant, side by side": KVCache(codec=KVQuant(codebook="uniform"), keys="raw", positions="slots"),
}


def both(cache, frequencies, monkeypatch, **options):
    """(in spans, as codes), each (out, lse), of a pass behind one of 70 tokens, and how often codes were read."""
    first, (q, k, v, info) = passes([70, 3], padding=9)
    state = run(cache, [first], **{name: x for name, x in options.items() if name != "scale"})
    state = cache.append(state, k, v, info, frequencies)
    read, forward = [], op.forward
    counted = lambda *given, **named: read.append(given[0]) or forward(*given, **named)
    monkeypatch.setattr(op, "forward", counted)
    q = rotate(q, info.positions, frequencies)
    attend = jax.jit(
        lambda state, q, backend: cache.attend(state, q, info, frequencies=frequencies, backend=backend, scale=0.4, **options),
        static_argnums=2,
    )
    found = [attend(state, q, backend) for backend in ("xla", "reference")]
    return *found, read


@pytest.mark.parametrize(
    "cache", [pytest.param(cache, id=name, marks=pytest.mark.slow if "int4" in name else ()) for name, cache in CACHES.items()]
)
@pytest.mark.parametrize("backend", ["xla", "reference"], ids=["in spans", "as codes"])
def test_slots_of_all_layers(cache, backend):
    """A pass reads and writes the layer that is meant, in spans and as codes, and no other."""
    frequencies, (first, (q, k, v, info)) = Rope().frequencies(8, 128), passes([70, 40], padding=9)
    state = run(cache, [first], mask=Causal())
    others = jax.tree.map(lambda x: jnp.stack([x[::-1], x, x]), state)
    q, rule = rotate(q, info.positions, frequencies), Rule(mask=Causal(), scale=0.4, softcap=None, bias=None)
    options = {"frequencies": frequencies, "scale": 0.4, "mask": Causal(), "backend": backend}

    @jax.jit
    def step(state):
        state = cache.append(state, k, v, info, frequencies)
        out, lse = cache.attend(state, q, info, **options)
        asked = Asked(q=q, raw=q, out=out, lse=lse, info=info.filled(), output=jnp.ones((HEADS, out.shape[3], 8)))
        return (out, lse), cache.prune(state, asked, frequencies=frequencies, rule=rule)

    alone, wanted = step(state)
    found, written = jax.jit(lambda states, n: step(of_layer(states, n)))(others, jnp.int32(1))
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    every = in_layers(others, written, jnp.int32(1))
    for a, b, c in zip(*map(jax.tree.leaves, (every, wanted, others)), strict=True):
        np.testing.assert_allclose(a[1], b, atol=1e-6)
        np.testing.assert_array_equal(a[::2], c[::2])


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_equals_spans(cache, monkeypatch):
    spans, codes, read = both(cache, Rope().frequencies(8, 128), monkeypatch, mask=Causal())
    assert len(read) == 1
    for a, b in zip(spans, codes, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"mask": Sink(size=2) | Window(size=30), "softcap": 3.0}, XPos()),
        ({"mask": Causal(), "bias": ALiBi()}, Rope(rotary=0.5, pairing="interleaved")),
    ],
    ids=["soft-cap and a rope that grows", "slopes and a rope of some channels"],
)
def test_masks_biases_and_ropes(options, rule, monkeypatch):
    cache = CACHES["KIVI, raw"]
    spans, codes, read = both(cache, rule.frequencies(8, 128), monkeypatch, **options)
    assert len(read) == 1
    for a, b in zip(spans, codes, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_a_kernel_meets_what_the_cache_holds(monkeypatch):
    """As on a TPU, interpreted: raw keys of 128 channels."""
    cache, D, T = KVCache(codec=KVQuant(codebook="uniform"), keys="raw"), 128, 64
    rng, frequencies, info = np.random.default_rng(3), Rope().frequencies(D, 128), causal_info(jnp.ones((1, T), jnp.int32))
    x = lambda n, heads: jnp.asarray(rng.normal(size=(1, n, heads, D)), jnp.float32)
    state = cache.init(1, 128, KV_HEADS, D, D, jnp.float32, at=At(heads=HEADS))
    q, k, v = x(T, HEADS), x(T, KV_HEADS), x(T, KV_HEADS)
    options = {"mask": Causal(), "scale": 0.1, "softcap": None, "bias": None}
    asked = Asked(q=q, raw=q, out=q, lse=q[..., 0], info=info.filled(), output=jnp.ones((HEADS, D, 5)))
    read = lambda state: cache.append(state, k, v, info, frequencies)
    state = jax.jit(lambda state: cache.prune(read(state), asked, frequencies=frequencies, rule=Rule(**options)))(state)
    assert (np.asarray(state.held.info.segments) != 0).sum() > 30
    late = causal_info(jnp.ones((1, 1), jnp.int32), start=jnp.full(1, T))
    state = cache.append(state, x(1, KV_HEADS), x(1, KV_HEADS), late, frequencies)
    q = rotate(x(1, HEADS), late.positions, frequencies)
    attend = functools.partial(cache.attend, state, q, late, frequencies=frequencies, **options)
    found = attend(backend="reference")
    kernel = types.SimpleNamespace(forward=functools.partial(tpu.forward, interpret=True))
    monkeypatch.setitem(op.FORMS, "reference", kernel)
    for a, b in zip(found, attend(backend="reference"), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)
