"""The tiled XLA form equals the float32 reference in value and gradient, costs what it says, and keeps nothing it need not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import arrays, compare, random_tokens, whole_document, with_gradient
from jax.sharding import PartitionSpec

from lcx.attention.mask import Causal, Chunk, Hide, Sink, Window, Within
from pallas_kernels.tile_attention import op, reference, xla
from pallas_kernels.tile_attention.tiling import cut, tile_size, uncut


@pytest.mark.parametrize(
    "mask, heads, softcap, rows",
    [
        (Causal(), (4, 2), None, 2),
        (Window(size=9) | (Sink(size=3) & Hide(query_role=1, key_role=0)), (2, 2), 2.0, 1),
        (Within(size=20) & Chunk(size=12), (3, 1), None, 4),
    ],
)
def test_many_tiles_equal_the_reference(mask, heads, softcap, rows):
    """Tiles of 16 x 32 over 45 queries and 70 keys, in rows that share a list of tiles and rows that do not."""
    H, K = heads
    fold = op.Tiled("xla", mask, 0.4, softcap, xla.Sizes(16, 32, rows))
    tiled = with_gradient(functools.partial(op.attention, fold))
    dense = with_gradient(functools.partial(reference.forward, mask=mask, scale=0.4, softcap=softcap))
    hidden = 0
    for seed, kind in enumerate(("packed", "special", "shuffled", "padding", "single", "single")):
        rng = np.random.default_rng(seed)
        given = *arrays(rng, 4, 45, 70, H, K, 8, 5), random_tokens(rng, 4, 45, kind), random_tokens(rng, 4, 70, kind)
        got = tiled(*given)
        compare(got, dense(*given), 2e-6)
        nothing = np.isneginf(got[1])
        assert not np.asarray(got[0])[nothing].any() and not np.asarray(got[2])[nothing].any()
        hidden += nothing.sum()
    assert hidden > 0


@pytest.mark.parametrize(
    "T, S",
    [
        pytest.param(7, 9, id="tiny", marks=pytest.mark.slow),
        pytest.param(300, 300, id="a document"),
        pytest.param(1, 5000, id="a step of decoding"),
        pytest.param(1, 1, id="one pair", marks=pytest.mark.slow),
        pytest.param(900, 30, id="few keys"),
    ],
)
def test_chosen_sizes_equal_the_reference(T, S):
    rng = np.random.default_rng(T)
    given = *arrays(rng, 3, T, S, 4, 2, 8, 6), random_tokens(rng, 3, T, "special"), random_tokens(rng, 3, S, "special")
    tiled = with_gradient(functools.partial(op.attention, op.Tiled("xla", Causal(), 0.3)))
    dense = with_gradient(functools.partial(reference.forward, mask=Causal(), scale=0.3))
    compare(tiled(*given), dense(*given), 2e-6)


def test_bfloat16_is_within_two_percent():
    rng = np.random.default_rng(0)
    fold = op.Tiled("xla", Causal(), 0.35, None, xla.Sizes(32, 32, 2))
    q, k, v, *rest = *arrays(rng, 2, 90, 90, 4, 2, 8, 8, jnp.bfloat16), *(random_tokens(rng, 2, 90, "packed"),) * 2
    got = with_gradient(functools.partial(op.attention, fold))(q, k, v, *rest)
    assert [x.dtype for x in got] == [jnp.float32] * 2 + [jnp.bfloat16] * 3
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    dense = with_gradient(functools.partial(reference.forward, mask=Causal(), scale=0.35))
    compare(got, dense(*wide, *rest), 2e-2)


@pytest.mark.parametrize("T, S", [(0, 5), (5, 0)])
def test_nothing_to_attend(T, S):
    q, k, v, *_ = arrays(np.random.default_rng(0), 1, T, S, 2, 1, 4, 3)
    out, lse = op.attention(op.Tiled("xla", Causal(), 1.0), q, k, v, whole_document(1, T), whole_document(1, S))
    assert out.shape == (1, T, 2, 3) and not out.any()
    assert lse.shape == (1, T, 2) and np.isneginf(lse).all()


def test_empty_tiles_are_never_read():
    """NaN stands in every key tile that causality makes empty for the first queries: what is not read does no harm."""
    rng = np.random.default_rng(0)
    q, k, v, *_ = arrays(rng, 1, 32, 64, 1, 1, 8, 8)
    k, v = (x.at[:, 32:].set(jnp.nan) for x in (k, v))
    fold = op.Tiled("xla", Causal(), 0.4, None, xla.Sizes(16, 16, 1))
    form = lambda q, k, v: op.attention(fold, q, k, v, whole_document(1, 32), whole_document(1, 64))[0]
    out, pull = jax.vjp(form, q, k, v)
    assert np.isfinite(out).all()
    dq, dk, dv = pull(jnp.ones_like(out))
    assert np.isfinite(dq).all()
    assert not dk[:, 32:].any() and not dv[:, 32:].any()


def layered(form, checkpoint):
    """Two attention layers scanned; weights [2, M, M]."""

    def layer(x, weight):
        q = (x @ weight).reshape(*x.shape[:2], 2, -1)
        return x + form(q, q, q).reshape(x.shape), None

    body = jax.checkpoint(layer) if checkpoint else layer
    return lambda x, weights: jax.lax.scan(body, x, weights)[0]


def test_scanned_layers_save_nothing_of_a_tile():
    """Between forward and backward only what a layer takes and gives is kept: no axis of 7 query tiles or 16 tokens."""
    T, M = 7 * 16, 20
    fold = op.Tiled("xla", Causal(), 0.3, None, xla.Sizes(16, 16, 1))
    tokens = random_tokens(np.random.default_rng(0), 3, T, "packed")

    def saved(x, weights, tokens):
        form = lambda q, k, v: op.attention(fold, q, k, v, tokens, tokens)[0]
        return jax.vjp(layered(form, False), x, weights)[1]

    x, weights = jax.ShapeDtypeStruct((3, T, M), jnp.float32), jax.ShapeDtypeStruct((2, M, M), jnp.float32)
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(saved, x, weights, tokens))]
    assert max(map(np.prod, shapes)) == 2 * 3 * T * M
    assert not [shape for shape in shapes if {7, 16} & set(shape)]


def test_checkpointed_layers_never_hold_the_masks_of_all_tiles():
    """A scan over layers hoists what does not depend on the layer; masks of 7 query tiles x 112 keys would be T x S."""
    T, M = 7 * 16, 20
    fold, tokens = op.Tiled("xla", Causal(), 0.3, None, xla.Sizes(16, T, 1)), whole_document(1, T)
    form = lambda q, k, v: op.attention(fold, q, k, v, tokens, tokens)[0]
    gradient = jax.grad(lambda x, w: layered(form, True)(x, w).sum(), (0, 1))
    jaxpr = jax.make_jaxpr(gradient)(jnp.zeros((1, T, M)), jnp.zeros((2, M, M)))
    shapes = {variable.aval.shape for equation in equations(jaxpr.jaxpr) for variable in equation.outvars}
    assert any({16, T} <= set(shape) for shape in shapes)  # a tile
    assert not [shape for shape in shapes if {7, 16, T} <= set(shape)]


def equations(jaxpr):
    """All equations, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_scanned_and_checkpointed_layers_equal_the_reference():
    T, M = 40, 12
    rng = np.random.default_rng(0)
    x, weights = (jnp.asarray(rng.normal(size=s) / 3, jnp.float32) for s in ((2, T, M), (2, M, M)))
    tokens, fold = random_tokens(rng, 2, T, "packed"), op.Tiled("xla", Causal(), 0.3, None, xla.Sizes(16, 16, 1))
    forms = (
        lambda q, k, v: op.attention(fold, q, k, v, tokens, tokens)[0],
        lambda q, k, v: reference.forward(q, k, v, tokens, tokens, mask=Causal(), scale=0.3)[0],
    )
    loss = lambda form: jax.jit(jax.grad(lambda x, w: jnp.square(layered(form, True)(x, w)).sum(), (0, 1)))
    for value, expected in zip(*(loss(form)(x, weights) for form in forms), strict=True):
        np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_shards_of_rows_and_heads_equal_the_whole():
    """Inside shard_map, with its types of varying axes checked."""
    rng = np.random.default_rng(0)
    given = *arrays(rng, 4, 40, 40, 4, 2, 8, 8), *(random_tokens(rng, 4, 40, "special"),) * 2
    run = with_gradient(functools.partial(op.attention, op.Tiled("xla", Causal(), 0.3, None, xla.Sizes(16, 16, 1))))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_head, by_row = PartitionSpec("data", None, "tensor"), PartitionSpec("data")
    local = lambda *a: run(*a[:5], *jax.tree.map(lambda x: jax.lax.pcast(x, "tensor", to="varying"), a[5:]))
    shards = jax.shard_map(local, mesh=mesh, in_specs=(*(by_head,) * 5, by_row, by_row), out_specs=by_head)
    compare(jax.jit(shards)(*given), run(*given), 1e-6)


def test_tiles_cover_the_length_with_little_padding():
    for length in (1, 5, 127, 128, 129, 513, 1000, 4097, 131072):
        for target in (128, 256, 4096):
            size = tile_size(length, target)
            count = -(-length // size)
            assert size <= max(target, 16) and count * size - length < 16 * count
            assert count > 1 or size == length


def test_cut_and_uncut():
    x = jnp.arange(4 * 21 * 6 * 3).reshape(4, 21, 6, 3)
    tiled = cut(x, 8, 2, 3)
    assert tiled.shape == (2, 3, 2, 3, 16, 3)
    np.testing.assert_array_equal(tiled[1, 2, 0, 1, 8 + 4], x[2, 20, 3])  # row 2, token 20, second head of the second group
    np.testing.assert_array_equal(uncut(tiled, 8, 21), x)
    assert not tiled[:, 2, :, :, 5:8].any() and not tiled[:, 2, :, :, 13:].any()
