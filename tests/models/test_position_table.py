"""Learned positions: what is added, what is read beyond the table, and that documents and steps do not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcx.batch import Batch, causal_info
from lcx.channels.glu import GLU
from lcx.inference.generate import generate
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, rebuild
from lcx.models.layer import Layer
from lcx.models.position_table import PositionTable
from lcx.parallel.mesh import MeshSpec
from lcx.spec import SpecError, edit


def decoder(table) -> Decoder:
    layer = Layer(mixer=Attention(heads=2, kv_heads=2, head_dim=8, rope="none"), channel=GLU(hidden=16))
    return Decoder(vocab=32, width=16, pattern=(layer,), periods=1, rope=None, position_table=table)


@jax.jit
def hidden(model, batch):
    return model(batch)[0]


def batch(segments, seed=0):
    segments = np.asarray(segments)
    tokens = np.random.default_rng(seed).integers(0, 32, segments.shape).astype(np.int32)
    return Batch(tokens=tokens, info=causal_info(segments))


def test_rows_between_two_old_ones_are_interpolated():
    module = PositionTable(rows=4, reading="interpolated", factor=2).build(3, rngs=nnx.Rngs(0))
    table = module.table[...]
    short, long = (module(causal_info(np.ones((1, n), np.int32)))[0] for n in (4, 8))
    np.testing.assert_array_equal(short, table)
    np.testing.assert_allclose(long[::2], table, rtol=1e-6)
    np.testing.assert_allclose(long[1], (table[0] + table[1]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(long[7], table[3])


@pytest.mark.parametrize("factor", [3, 7, pytest.param(41, marks=pytest.mark.slow)])
def test_learned_rows_begin_interpolated_and_old_rows_are_no_part_of_them(factor):
    """7 and 41: a seventh of 21 in float32 is not 3."""
    spec = PositionTable(rows=4, reading="interpolated", factor=factor, between="learned")
    module, plain = (s.build(2, rngs=nnx.Rngs(0)) for s in (spec, dataclasses.replace(spec, between="interpolated")))
    info = causal_info(np.ones((1, 4 * factor), np.int32))
    read = jax.jit(lambda module, info: module(info))
    np.testing.assert_allclose(read(module, info), read(plain, info), atol=2e-7)
    learned = np.arange(8.0 * (factor - 1)).reshape(-1, 2)
    module.between[...] = jnp.asarray(learned, jnp.float32)
    added = np.asarray(read(module, info) - read(plain, info))[0]
    np.testing.assert_array_equal(added[::factor], 0)
    np.testing.assert_allclose(added[np.arange(4 * factor) % factor > 0], learned, atol=1e-4)
    short = causal_info(np.ones((1, 4), np.int32))
    np.testing.assert_array_equal(read(module, short), read(plain, short))


def test_a_moved_document_reads_the_long_table():
    """LongEmbed's tuning: 3 tokens from place 5 on read thirds of rows 5 to 7."""
    module = PositionTable(rows=4, reading="interpolated", factor=3).build(2, rngs=nnx.Rngs(0))
    info = causal_info(np.ones((1, 3), np.int32), lengths=jnp.full((1, 3), 12))
    read = jax.jit(lambda module, info: module(info))
    moved = read(module, dataclasses.replace(info, positions=info.positions + 5))
    whole = read(module, causal_info(np.ones((1, 12), np.int32)))
    np.testing.assert_array_equal(moved[0], whole[0, 5:8])
    short = causal_info(np.ones((1, 3), np.int32))  # which nobody told that it is to be longer
    far = read(module, dataclasses.replace(short, positions=short.positions + 3))[0]
    assert np.isfinite(far[0]).all() and np.isnan(far[1:]).all()


@pytest.mark.parametrize("reading", ["grouped", "recurrent", "interpolated"])
def test_a_document_reads_as_it_does_alone_and_a_trained_table_serves(reading):
    """Packed beside another one; documents that fit read as before."""
    plain = decoder(PositionTable(rows=6)).build(rngs=nnx.Rngs(0))
    factor = {"interpolated": 3}.get(reading, 1)
    model = rebuild(plain, decoder(PositionTable(rows=6, reading=reading, factor=factor)))
    packed = batch([[1] * 5 + [2] * 12])
    found = hidden(model, packed)[0]
    for cut in (slice(0, 5), slice(5, 17)):
        alone = Batch(tokens=packed.tokens[:, cut], info=causal_info(np.ones((1, cut.stop - cut.start), np.int32)))
        np.testing.assert_allclose(found[cut], hidden(model, alone)[0], atol=2e-6)
        if len(alone.tokens[0]) <= 6:
            np.testing.assert_allclose(found[cut], hidden(plain, alone)[0], atol=1e-6)
    assert np.isfinite(found).all() and not np.isfinite(hidden(plain, packed)[0, 11:]).any()


@pytest.mark.parametrize("reading", [pytest.param("grouped", marks=pytest.mark.slow), "interpolated"])
def test_generation_equals_one_pass(reading):
    factor = {"interpolated": 3}.get(reading, 1)
    model = decoder(PositionTable(rows=6, reading=reading, factor=factor)).build(rngs=nnx.Rngs(0))
    (row,) = generate(model, [[3, 1, 4, 1, 5]], max_new=4, chunk=5)
    whole = np.asarray([[3, 1, 4, 1, 5, *row.ids]], np.int32)
    best = model.logits(hidden(model, Batch(tokens=whole, info=causal_info(np.ones_like(whole)))))[0].argmax(axis=-1)
    assert row.ids == best[4:-1].tolist() and jnp.isfinite(jnp.asarray(row.logprobs)).all()


def test_a_factor_without_interpolation_is_refused():
    with pytest.raises(SpecError, match="factor = 2: expected 1 where reading is not 'interpolated'"):
        edit(decoder(PositionTable(rows=6)), "position_table.factor", 2)
    with pytest.raises(SpecError, match="between = 'learned': expected 'interpolated' where factor is 1"):
        PositionTable(rows=6, reading="interpolated", between="learned")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshSpec(fsdp=2, context=4), MeshSpec(fsdp=2, tensor=2)], ids=str)
def test_on_a_mesh(mesh):
    given = batch([[1] * 9 + [2] * 7, [1] * 16, [0] * 3 + [1] * 13, [1] * 2 + [2] * 14])

    def value_and_gradient():
        graph, state = nnx.split(decoder(PositionTable(rows=6, reading="interpolated", factor=3)).build(rngs=nnx.Rngs(0)))
        real = (given.info.segments > 0)[..., None]
        loss = lambda state: jnp.where(real, jnp.sin(nnx.merge(graph, state)(given)[0]), 0).sum()
        return jax.jit(jax.value_and_grad(loss))(state)

    alone = value_and_gradient()
    with jax.set_mesh(mesh.build()):
        shared = value_and_gradient()
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
