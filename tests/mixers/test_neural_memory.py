"""Titans' neural memory: the layer equals its formulas, stays finite where it is bounded, and lies on any mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import LinearMemory, silu, weights_of
from flax import nnx
from meshes import equal_on_a_mesh

from lcx.batch import Batch, causal_info
from lcx.mixers.mixer import Inherited
from lcx.mixers.neural_memory import NeuralMemory
from lcx.parallel.rules import Rules

WIDTH, T = 8, 11
LINEAR = NeuralMemory(heads=2, head_dim=4, depth=1, network="plain", chunk=4, overshoot=None, norm=None)


def module_of(spec, compute="float32", documents=2):
    inherited = Inherited(width=WIDTH, depth=1, rope=None, compute=compute, rules=Rules(), documents=documents)
    return spec.build(inherited, rngs=nnx.Rngs(0))


def rows(segments, seed=0):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(*np.shape(segments), WIDTH)), jnp.float32)
    return x, Batch(tokens=jnp.zeros(np.shape(segments), jnp.int32), info=causal_info(np.asarray(segments)))


@jax.jit
def run(module, x, batch, state=None):
    return module(x, batch, state)


@pytest.mark.parametrize("gradient", ["start", "token"])
def test_the_layer_equals_its_formulas(gradient):
    """Two documents with padding before, between and behind; each from the learned start, its chunks its own."""
    spec = dataclasses.replace(LINEAR, gradient=gradient)
    module = module_of(spec)
    x, batch = rows([[0] + [1] * T + [0] * 2 + [2] * 5 + [0]])
    y = run(module, x, batch)[0][0]
    weights = weights_of(module)
    for places in (slice(1, 1 + T), slice(3 + T, 8 + T)):
        document = np.asarray(x[0, places], np.float64)
        memory, out = LinearMemory(spec, weights), []
        q, k, v = (memory.projected(document, name) for name in ("query", "key", "value"))
        for t in range(len(document)):
            memory.write(k[t], v[t], document[t])
            out.append(memory.read(q[t]))
        gate = silu(np.einsum("tm,mhd->thd", document, weights["gate"]))
        normed = np.stack(out) / np.sqrt((np.stack(out) ** 2).mean(axis=-1, keepdims=True) + 1e-6)
        wanted = np.einsum("thd,hdm->tm", normed * weights["norm.weight"] * gate, weights["output"])
        np.testing.assert_allclose(y[places], wanted, atol=5e-6)


def test_more_documents_than_there_is_room_for_give_nan():
    x, batch = rows([[1] * 4 + [2] * 3 + [3] * 2 + [4] * 2])
    y = run(module_of(LINEAR, documents=1), x, batch)[0]
    assert np.isfinite(y[:, :9]).all() and np.isnan(y[:, 9:]).all()


def test_what_cannot_be_answered_stays_so_until_the_next_document():
    """In generation: a second document for which a fed chunk has no room, and a row that begins within a document."""
    module = module_of(LINEAR, documents=1)
    x, batch = rows([[1] * 6 + [2] * 2])
    y, state, _ = run(module, x, batch, module.init_state(1, 12))
    assert np.isfinite(y[:, :6]).all() and np.isnan(y[:, 6:]).all()
    token = lambda index: Batch(
        tokens=jnp.zeros((1, 1), jnp.int32), info=causal_info(2 * np.ones((1, 1), np.int32), np.asarray([index]))
    )
    y, state, _ = run(module, x[:, :1], token(2), state)
    assert np.isnan(y).all()
    y, state, _ = run(module, x[:, :1], token(0), state)
    assert np.isfinite(y).all()
    assert np.isnan(run(module, x[:, :1], token(3), module.init_state(1, 12))[0]).all()


def test_steps_cannot_overshoot():
    """Sixteen times one key at the largest step: unbounded steps leave the value behind, bounded ones end at it."""
    x = jnp.ones((1, 32, WIDTH))
    batch = Batch(tokens=jnp.zeros((1, 32), jnp.int32), info=causal_info(np.ones((1, 32), np.int32)))
    errors = {}
    for overshoot in (None, 1.0):
        spec = dataclasses.replace(LINEAR, chunk=16, taps=0, overshoot=overshoot, momentum=False, decay=False, step=2.0)
        errors[overshoot] = float(run(module_of(spec), x, batch)[2]["memory_error"])
    assert errors[1.0] < 0.6 * errors[None] and errors[1.0] < 5


def test_matrices_keep_their_norm():
    spec = dataclasses.replace(LINEAR, chunk=2, taps=0, norm=0.5, step=2.0)
    module = module_of(spec)
    x, batch = rows([[1] * 12])
    memory = run(module, x, batch, module.init_state(1, 12))[1].memory.memory
    for matrices in (memory.weights.matrices, memory.momentum.matrices):
        assert all(np.linalg.norm(matrix, axis=(-2, -1)).max() < 0.5001 for matrix in matrices)


@pytest.mark.parametrize("heads", [4, pytest.param(2, marks=pytest.mark.slow)])  # over the sequence's axis too; not
def test_on_a_mesh(heads):
    spec = dataclasses.replace(LINEAR, heads=heads)
    module, (x, batch) = module_of(spec), rows([[1] * 9 + [2] * 7, [1] * 16])
    equal_on_a_mesh(module, x, batch, 1e-4)


def test_the_state_is_float32_where_the_model_computes_in_bfloat16():
    module, (x, batch) = module_of(LINEAR, "bfloat16"), rows([[1] * T])
    y, state, _ = run(module, x.astype(jnp.bfloat16), batch, module.init_state(1, T))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.memory.memory)} == {jnp.dtype(jnp.float32)}
