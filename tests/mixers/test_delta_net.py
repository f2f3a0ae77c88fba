"""Gated DeltaNet and its simpler forms: the layer equals its formulas written out, and lies on any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.mixers.delta_net import GatedDeltaNet
from lcx.mixers.mixer import Inherited
from lcx.parallel.mesh import MeshSpec
from lcx.parallel.rules import Rules

WIDTH, T = 8, 11
FORMS = [spec for spec in GatedDeltaNet.examples() if spec.taps]


def module_of(spec, compute="float32"):
    inherited = Inherited(width=WIDTH, depth=1, rope=None, compute=compute, rules=Rules())
    return spec.build(inherited, rngs=nnx.Rngs(0))


def rows(segments):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*np.shape(segments), WIDTH)), jnp.float32)
    return x, Batch(tokens=jnp.zeros(np.shape(segments), jnp.int32), info=causal_info(np.asarray(segments)))


@jax.jit
def run(module, x, batch, state=None):
    return module(x, batch, state)[:2]


def by_hand(spec, module, x):
    """One document [T,M] in float64, token by token."""
    weights = {
        name: np.asarray(leaf, np.float64) for (name, *_), leaf in nnx.to_flat_state(nnx.state(module)) if name != "norm"
    }
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    silu = lambda y: y * sigmoid(y)

    def local(name):
        y = np.einsum("tm,mhd->thd", x, weights[name])
        kernel = weights[f"{name}_kernel"]
        past = np.concatenate([np.zeros((len(kernel) - 1, *y.shape[1:])), y])
        return silu(sum(kernel[n] * past[len(kernel) - 1 - n :][: len(y)] for n in range(len(kernel))))

    unit = lambda y: y / np.sqrt((y * y).sum(axis=-1, keepdims=True) + 1e-6)
    q, k, v = unit(local("query")), unit(local("key")), local("value")
    beta, gate = spec.beta * sigmoid(x @ weights["beta"]), silu(np.einsum("tm,mhe->the", x, weights["gate"]))
    keep = np.ones_like(beta)
    if spec.decay == "learned":
        softplus = np.log1p(np.exp(x @ weights["decay"] + weights["decay_bias"]))
        keep = np.exp(-np.exp(weights["rate_bias"]) * softplus)
    memory, found = np.zeros((spec.heads, spec.head_dim, spec.values)), []
    for t in range(len(x)):
        memory = keep[t][:, None, None] * memory
        held = np.einsum("hde,hd->he", memory, k[t]) if spec.rule == "delta" else 0
        memory += np.einsum("hd,he->hde", k[t], beta[t][:, None] * (v[t] - held))
        out = np.einsum("hde,hd->he", memory, q[t]) / np.sqrt(spec.head_dim)
        out /= np.sqrt((out**2).mean(axis=-1, keepdims=True) + spec.norm_eps)
        found.append(np.einsum("he,hem->m", out * np.asarray(module.norm.weight[...]) * gate[t], weights["output"]))
    return np.stack(found)


@pytest.mark.parametrize("spec", FORMS, ids=lambda spec: f"{spec.rule}-{spec.decay}")
def test_the_layer_equals_its_formulas(spec):
    """Two documents with padding before, between and behind; each from an empty memory."""
    module = module_of(spec)
    x, batch = rows([[0] + [1] * T + [0] * 2 + [2] * 5 + [0]])
    y = run(module, x, batch)[0][0]
    for places in (slice(1, 1 + T), slice(3 + T, 8 + T)):
        np.testing.assert_allclose(y[places], by_hand(spec, module, np.asarray(x[0, places], np.float64)), atol=2e-6)


def test_a_document_in_two_places_of_a_row_gives_nan():
    x, batch = rows([[1] * 4 + [2] * 3 + [1] * 4])
    info = dataclasses.replace(batch.info, index=jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 4, 5, 6, 7]]))
    y, _ = run(module_of(FORMS[0]), x, dataclasses.replace(batch, info=info))
    assert np.isfinite(y[:, :7]).all() and np.isnan(y[:, 7:]).all()


def test_a_document_that_comes_back_in_chunks_gives_nan_and_one_that_goes_on_does_not():
    module, (x, batch) = module_of(FORMS[0]), rows([[1] * 4 + [0] * 2 + [1] * 3 + [2] * 3])
    state = module.init_state(1, T)
    part = lambda info: Batch(tokens=jnp.zeros(info.shape, jnp.int32), info=info)
    _, state = run(module, x[:, :6], part(batch.info.take(slice(0, 6))), state)
    assert (state.index.tolist(), state.segments.tolist()) == ([3], [1])
    y, state = run(module, x[:, 6:12], part(batch.info.take(slice(6, 12))), state)
    assert np.isfinite(y).all() and (state.index.tolist(), state.segments.tolist()) == ([2], [2])
    info = dataclasses.replace(
        batch.info.take(slice(0, 6)), index=jnp.asarray([[3, 7, 8, 9, 10, 11]]), segments=jnp.asarray([[2] + [1] * 5])
    )
    y, _ = run(module, x[:, :6], part(info), state)
    assert np.isfinite(y[:, 0]).all() and np.isnan(y[:, 1:]).all()


@pytest.mark.parametrize("heads", [4, pytest.param(2, marks=pytest.mark.slow)])  # over the sequence's axis too; not
def test_on_a_mesh(heads):
    spec = GatedDeltaNet(heads=heads, head_dim=4, chunk=4)
    module, (x, batch) = module_of(spec), rows([[1] * 9 + [2] * 7, [1] * 16])

    def scalar(module, x):
        y = module(x, batch)[0]
        return jnp.sin(y).sum(), y

    both = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))
    wanted = both(module, x)
    with jax.set_mesh(MeshSpec(data=2, context=2, tensor=2).build()):
        found = both(module, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=5e-6), found, wanted)


def test_the_state_is_float32_where_the_model_computes_in_bfloat16():
    spec = FORMS[0]
    module, (x, batch) = module_of(spec, "bfloat16"), rows([[1] * T])
    y, state = run(module, x.astype(jnp.bfloat16), batch, module.init_state(1, T))
    assert y.dtype == jnp.bfloat16 and state.memory.dtype == jnp.float32 and state.key.x.dtype == jnp.bfloat16
    exact, _ = run(module_of(spec), x.astype(jnp.bfloat16).astype(jnp.float32), batch)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


@pytest.mark.parametrize("options, field", [({"beta": 2.5}, "beta"), ({"chunk": 0}, "chunk"), ({"value_dim": 0}, "value_dim")])
def test_wrong_settings_are_refused(options, field):
    with pytest.raises(ValueError, match=rf"GatedDeltaNet.{field} = "):
        GatedDeltaNet(**({"heads": 2, "head_dim": 4} | options))
