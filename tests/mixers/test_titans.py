"""Titans' layers equal their formulas written out, and lie on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import LinearMemory, rms, silu, weights_of
from flax import nnx
from meshes import equal_on_a_mesh

from lcx.attention.mask import Window
from lcx.batch import Batch, causal_info
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited
from lcx.mixers.neural_memory import NeuralMemory
from lcx.mixers.titans import TitansMAG, TitansMAL
from lcx.mixers.titans_mac import TitansMAC
from lcx.parallel.rules import Rules
from lcx.spec import SpecError

WIDTH, T, C = 8, 11, 4
MEMORY = NeuralMemory(heads=2, head_dim=4, depth=1, network="plain", chunk=C, overshoot=None, norm=None)
ATTENTION = Attention(heads=2, kv_heads=1, head_dim=4, rope="none", persistent=3)
MAC = TitansMAC(attention=ATTENTION, memory=MEMORY)


def module_of(spec, documents=2):
    inherited = Inherited(width=WIDTH, depth=1, rope=None, compute="float32", rules=Rules(), documents=documents)
    return spec.build(inherited, rngs=nnx.Rngs(0))


def rows(segments):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*np.shape(segments), WIDTH)), jnp.float32)
    return x, Batch(tokens=jnp.zeros(np.shape(segments), jnp.int32), info=causal_info(np.asarray(segments)))


@jax.jit
def run(module, x, batch):
    return module(x, batch)[0]


def attend(weights, x, context):
    """One token x [M] over persistent keys and a context [S,M], one key head."""
    q = np.einsum("m,mhd->hd", x, weights["query"])
    k = np.concatenate([weights["persistent_keys"][0], np.einsum("sm,md->sd", context, weights["key"][:, 0])])
    v = np.concatenate([weights["persistent_values"][0], np.einsum("sm,md->sd", context, weights["value"][:, 0])])
    scores = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
    return np.einsum("hd,hdm->m", scores / scores.sum(axis=-1, keepdims=True) @ v, weights["output"])


def part(weights, name):
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def test_mac_equals_its_formulas():
    """Two documents, padding between; segments of four tokens, the last of each not whole."""
    module = module_of(MAC)
    x, batch = rows([[1] * T + [0] * 2 + [2] * 6])
    found = run(module, x, batch)[0]
    weights = weights_of(module)
    for places in (slice(0, T), slice(T + 2, T + 8)):
        document = np.asarray(x[0, places], np.float64)
        memory = LinearMemory(MEMORY, part(weights, "memory"))
        asked, ys, wanted = memory.projected(document, "query"), [], []
        for i in range(len(document)):
            start = i // C * C
            if i == start:
                before = memory.w.copy()
            recalled = np.einsum("hde,thd->the", before, asked[start : i + 1])
            recalled = rms(memory.joined(recalled), weights["recall_norm.weight"])
            context = np.concatenate([recalled, document[start : i + 1]])
            ys.append(attend(part(weights, "attention"), document[i], context))
            q, k, v = (memory.projected(np.stack(ys), name)[i] for name in ("query", "key", "value"))
            memory.write(k, v, ys[i])
            held = rms(memory.joined(memory.read(q)), weights["memory_norm.weight"])
            wanted.append(rms(ys[i], weights["attention_norm.weight"]) * silu(held) / np.sqrt(2))
        np.testing.assert_allclose(found[places], np.stack(wanted), atol=1e-5)


def test_mag_and_mal_join_their_parts():
    x, batch = rows([[1] * 7 + [2] * 6])
    attention = Attention(heads=2, kv_heads=1, head_dim=4, rope="none", mask=Window(size=5), persistent=3)
    parts = {"attention": attention, "memory": MEMORY}
    mag, mal = module_of(TitansMAG(**parts, act="sigmoid")), module_of(TitansMAL(**parts))
    seen, held = (run(module, x, batch) for module in (mag.attention, mag.memory))
    normed = lambda y: y / jnp.sqrt(jnp.mean(y**2, axis=-1, keepdims=True) + 1e-6)
    wanted = normed(seen) * jax.nn.sigmoid(normed(held)) / np.sqrt(2)
    np.testing.assert_allclose(run(mag, x, batch), wanted, atol=2e-6)
    wanted = run(mal.attention, normed(run(mal.memory, x, batch)), batch)
    np.testing.assert_allclose(run(mal, x, batch), wanted, atol=2e-6)


def test_persistent_keys_are_seen_beyond_a_window_and_turned_by_nothing():
    spec = Attention(heads=2, kv_heads=1, head_dim=4, rope="none", mask=Window(size=3), persistent=3, softcap=2.0)
    module = module_of(spec)
    x, batch = rows([[1] * 6])
    found, weights = run(module, x, batch)[0], weights_of(module)
    for t in range(6):
        context, last = np.asarray(x[0, max(0, t - 2) : t + 1], np.float64), np.asarray(x[0, t], np.float64)
        q = np.einsum("m,mhd->hd", last, weights["query"])
        k = np.concatenate([weights["persistent_keys"][0], context @ weights["key"][:, 0]])
        v = np.concatenate([weights["persistent_values"][0], context @ weights["value"][:, 0]])
        scores = np.exp(2 * np.tanh(q @ k.T / 2 / 2))
        wanted = np.einsum("hd,hdm->m", scores / scores.sum(axis=-1, keepdims=True) @ v, weights["output"])
        np.testing.assert_allclose(found[t], wanted, atol=2e-6)


@pytest.mark.slow
def test_mac_on_a_mesh():
    attention = Attention(heads=4, kv_heads=2, head_dim=4, rope="none", persistent=2)
    module = module_of(TitansMAC(attention=attention, memory=NeuralMemory(heads=4, head_dim=4, chunk=4, expand=2)))
    x, batch = rows([[1] * 9 + [2] * 7, [1] * 16])
    equal_on_a_mesh(module, x, batch, 1e-4)


def test_what_a_segment_does_not_have_is_refused():
    with pytest.raises(SpecError, match=r"attention = .*expected one whose mask is Causal\(\)"):
        TitansMAC(attention=Attention(heads=1, kv_heads=1, head_dim=4, mask=Window(size=2)), memory=MEMORY)
    with pytest.raises(SpecError, match=r"gradient = 'token'.*depth 1"):
        NeuralMemory(heads=1, head_dim=4, gradient="token", overshoot=None)
