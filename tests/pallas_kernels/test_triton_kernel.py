"""The Triton kernels, interpreted, equal the float32 reference in value and gradient, and they lower to Triton for CUDA."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKS,
    OneForm,
    arrays,
    beside_the_reference,
    compare,
    described,
    listed,
    random_tokens,
    whole_document,
    with_gradient,
)

from lcx.attention.mask import Causal
from pallas_kernels.tile_attention import op, reference, triton
from pallas_kernels.tile_attention.blocks import Shape
from pallas_kernels.tile_attention.tokens import Bias, Tokens
from pallas_kernels.tile_attention.triton_blocks import ANY, SHARED, Blocks, Tile, choose_blocks, shared_bytes, sizes

KINDS = ("packed", "special", "shuffled", "padding", "single")


def both(mask, softcap=None, **options):
    return beside_the_reference(triton, mask, softcap, **options)


@pytest.mark.parametrize(
    "mask, heads, widths, softcap, blocks",
    [
        (MASKS[0], (2, 2), (64, 64), None, Blocks.same(32, 32)),
        (MASKS[1], (6, 2), (128, 40), 2.0, Blocks.same(16, 32)),
        pytest.param(
            *(MASKS[2], (4, 1), (40, 64), None, Blocks(Tile(32, 64), Tile(64, 16), Tile(16, 64))), marks=pytest.mark.slow
        ),
        (MASKS[3], (2, 1), (128, 128), None, Blocks.same(32, 16)),
    ],
    ids=["causal", "window or sink", "chunk", "beyond"],
)
def test_equals_the_reference(mask, heads, widths, softcap, blocks):
    """Lengths that are no multiple of a tile, groups of one to four heads, widths that need padding and do not."""
    tiled, dense = both(mask, softcap, blocks=blocks)
    hidden = 0
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        given = *arrays(rng, 2, 71, 101, *heads, *widths), random_tokens(rng, 2, 71, kind), random_tokens(rng, 2, 101, kind)
        got = tiled(*given)
        compare(got, dense(*given), 3e-6)
        nothing = np.isneginf(got[1])
        assert not np.asarray(got[0])[nothing].any() and not np.asarray(got[2])[nothing].any()
        hidden += nothing.sum()
    assert hidden > 0


@pytest.mark.parametrize("T, H, stacked", [(5, 8, 4), (20, 12, 2), (1, 12, 2)])
def test_heads_are_stacked_where_queries_are_few(T, H, stacked):
    rng = np.random.default_rng(0)
    blocks = Blocks.same(64, 32)
    size = sizes("forward", Shape(T, 70, H // 2, 64, 64), blocks.forward)
    assert stacked == size.G
    given = *arrays(rng, 1, T, 70, H, 2, 64, 64), random_tokens(rng, 1, T, "special"), random_tokens(rng, 1, 70, "special")
    tiled, dense = both(Causal(), blocks=blocks)
    compare(tiled(*given), dense(*given), 3e-6)


def test_full_and_empty_tiles_at_positions_of_a_million():
    """One document: tiles below the diagonal are full. NaN stands where no query looks: what is not read does no harm."""
    rng = np.random.default_rng(0)
    given = arrays(rng, 1, 96, 96, 2, 1, 64, 64)
    tokens = Tokens(*(x + 1_000_000 for x in whole_document(1, 96)[:2]), *whole_document(1, 96)[2:])
    tiled, dense = both(Causal(), blocks=Blocks.same(32, 32))
    compare(tiled(*given, tokens, tokens), dense(*given, tokens, tokens), 3e-6)
    q, k, v, *cotangents = given
    k, v = (x.at[:, 64:].set(jnp.nan) for x in (k, v))
    early = tokens._replace(order=jnp.minimum(tokens.order, 1_000_063), segments=tokens.segments.at[:, 64:].set(0))
    out, _, dq, dk, dv = tiled(q, k, v, *cotangents, early, tokens)
    assert all(np.isfinite(x).all() for x in (out, dq, dk[:, :64], dv[:, :64]))
    assert not dk[:, 64:].any() and not dv[:, 64:].any()


def test_bfloat16_is_within_two_percent():
    rng = np.random.default_rng(0)
    tiled, dense = both(Causal())
    q, k, v, *rest = *arrays(rng, 2, 201, 201, 4, 2, 64, 64, jnp.bfloat16), *(random_tokens(rng, 2, 201, "packed"),) * 2
    got = tiled(q, k, v, *rest)
    assert [x.dtype for x in got] == [jnp.float32] * 2 + [jnp.bfloat16] * 3
    compare(got, dense(*(x.astype(jnp.float32) for x in (q, k, v)), *rest), 2e-2)


@pytest.mark.parametrize(
    "groups, dtype, tolerance",
    [
        pytest.param(1, jnp.float32, 3e-6, marks=pytest.mark.slow),
        (2, jnp.bfloat16, 2e-2),
        pytest.param(4, jnp.float32, 3e-6, marks=pytest.mark.slow),
    ],
)
def test_tiles_of_a_list_are_cut_into_those_of_the_kernels(groups, dtype, tolerance):
    (q, k, v, *rest), tiles, pairs = listed(groups, 141, 201)
    given = *(x.astype(dtype) for x in (q, k, v)), *rest
    options = {"mask": Causal(), "scale": 0.1}
    if groups == 4:  # a list for every query head: `gpu.backward` gives each keys of its own
        given = given[0], *(jnp.repeat(x, 2, axis=2) for x in given[1:3]), *rest
    form = OneForm(triton, **options, tiles=tiles, tile=(128, 128), interpret=True)
    got = with_gradient(functools.partial(op.attention, form))(*given)
    dense = functools.partial(reference.forward, **options, allowed=pairs)
    compare(got, with_gradient(dense)(*(x.astype(jnp.float32) for x in given[:3]), *rest), tolerance)


def test_gradients_of_shards_of_keys_add_up():
    """Each half of the keys is given the lse of both, as a ring gives it; some rows see nothing in one half."""
    rng = np.random.default_rng(0)
    q, k, v, d_out, d_lse = arrays(rng, 2, 50, 96, 2, 1, 64, 64)
    q_tokens, k_tokens = random_tokens(rng, 2, 50, "special"), random_tokens(rng, 2, 96, "special")
    options = {"mask": Causal(), "scale": 0.2}
    out, lse, *expected = with_gradient(functools.partial(reference.forward, **options))(
        q, k, v, d_out, d_lse, q_tokens, k_tokens
    )
    delta = jnp.sum(d_out * out, axis=-1) - jnp.where(jnp.isneginf(lse), 0, d_lse)
    run = jax.jit(functools.partial(triton.backward, **options, blocks=Blocks.same(32, 32), interpret=True))
    halves = []
    for half in (slice(0, 48), slice(48, 96)):
        part = Tokens(*(field[:, half] for field in k_tokens))
        halves.append(run(q, k[:, half], v[:, half], q_tokens, part, lse, delta, d_out))
    (dq, dk, dv), (dq_2, dk_2, dv_2) = halves
    got = out, lse, dq + dq_2, jnp.concatenate([dk, dk_2], 1), jnp.concatenate([dv, dv_2], 1)
    compare(got, (out, lse, *expected), 3e-6)


@pytest.mark.parametrize("T, S", [(0, 5), (5, 0)])
def test_nothing_to_attend(T, S):
    q, k, v, d_out, d_lse = arrays(np.random.default_rng(0), 1, T, S, 2, 1, 4, 3)
    tokens = whole_document(1, T), whole_document(1, S)
    out, lse = triton.forward(q, k, v, *tokens, mask=Causal(), scale=1.0)
    assert out.shape == (1, T, 2, 3) and not out.any() and np.isneginf(lse).all()
    grads = triton.backward(q, k, v, *tokens, lse, d_lse, d_out, mask=Causal(), scale=1.0)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, (q, k, v), strict=True))


def kernels_of(form, *inputs):
    """Triton kernels of a function lowered for an H100."""
    with described("NVIDIA H100 80GB HBM3"):
        lowered = jax.jit(lambda *inputs: form(*inputs)).trace(*inputs).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("xla.gpu.triton")


@pytest.mark.parametrize("mask", MASKS, ids=repr)
@pytest.mark.parametrize("T, H, D, dtype", [(8192, 8, 128, jnp.bfloat16), (100, 6, 80, jnp.float32)])
def test_lowers_for_cuda(mask, T, H, D, dtype):
    """Chosen blocks, long and short, stacked and padded; one Triton kernel forward, two backward."""
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    tokens = Tokens(*(array(2, T, dtype=jnp.int32),) * 4)
    given = array(2, T, H, D), array(2, T, 2, D), array(2, T, 2, D), tokens, tokens
    rows = *(array(2, T, H, dtype=jnp.float32),) * 2, array(2, T, H, D, dtype=jnp.float32)
    bias = Bias(jnp.full((2, T, H), 0.5), "index")
    for modifier in ({"softcap": 30.0}, {"bias": bias})[: 2 if mask == MASKS[0] else 1]:
        options = {"mask": mask, "scale": 0.1, **modifier}
        assert kernels_of(functools.partial(triton.forward, **options), *given) == 1
        assert kernels_of(functools.partial(triton.backward, **options), *given, *rows) == 2


def test_what_does_not_fit_is_named():
    q, k, v, *_ = arrays(np.random.default_rng(0), 1, 500, 500, 2, 1, 128, 128)
    call = functools.partial(triton.forward, mask=Causal(), scale=1.0)
    tokens = whole_document(1, 500), whole_document(1, 500)
    with pytest.raises(ValueError, match="float32, bfloat16, float32: expected one"):
        call(q, k.astype(jnp.bfloat16), v, *tokens)
    with pytest.raises(ValueError, match=r"forward = \(128, 64\) with heads of 128 and 128 in float32 takes 195 KiB"):
        call(q, k, v, *tokens, blocks=Blocks.same(128, 64))
    with pytest.raises(ValueError, match=r"key_gradient = \(32, 48\): expected powers of two from 16"):
        Blocks(Tile(32, 32), Tile(32, 32), Tile(32, 48))
    with pytest.raises(ValueError, match=r"forward = .* with heads of 2048 and 2048 in float32 takes .* on H100"):
        choose_blocks(Shape(5, 5, 1, 2048, 2048), jnp.float32, "H100")


@pytest.mark.parametrize("chip", [None, *SHARED])
def test_chosen_blocks_fit(chip):
    for T, G, D, dtype in itertools.product((1, 100_000), (1, 6, 24), (40, 128, 256), (jnp.bfloat16, jnp.float32)):
        shape = Shape(T, 100_000, G, D, D)
        blocks = choose_blocks(shape, dtype, chip)
        assert choose_blocks(shape, dtype, chip, blocks) == blocks
        for name in ("forward", "query_gradient", "key_gradient"):
            assert shared_bytes(name, shape, getattr(blocks, name), dtype) <= SHARED.get(chip, ANY)


# Bytes that the Triton compiler (3.9) allocates: kernel, capability 9.0 or 8.0, head size, tile, dtype.
ALLOCATED = [
    ("forward", 64, Tile(128, 128), jnp.bfloat16, 82948, 50180),
    ("forward", 128, Tile(128, 64), jnp.bfloat16, 99332, 66052),
    ("forward", 256, Tile(64, 64), jnp.bfloat16, 164356, None),
    ("forward", 64, Tile(64, 64, stages=7), jnp.bfloat16, 75276, None),
    ("forward", 128, Tile(32, 32), jnp.float32, 53508, 53508),
    ("query_gradient", 128, Tile(128, 64), jnp.bfloat16, 132100, 98820),
    ("query_gradient", 64, Tile(64, 64, stages=5), jnp.bfloat16, 66568, None),
    ("query_gradient", 256, Tile(64, 32), jnp.bfloat16, 131332, 102660),
    ("key_gradient", 128, Tile(64, 64), jnp.bfloat16, 100100, 74756),
    ("key_gradient", 64, Tile(64, 64, stages=7), jnp.bfloat16, 85772, None),
    ("key_gradient", 128, Tile(128, 128), jnp.bfloat16, 199172, None),
]


@pytest.mark.parametrize("name, width, tile, dtype, hopper, ampere", ALLOCATED)
def test_the_estimate_bounds_what_the_compiler_allocates(name, width, tile, dtype, hopper, ampere):
    estimate = shared_bytes(name, Shape(4096, 4096, 1, width, width), tile, dtype)
    assert (ampere or 0) <= estimate and hopper <= estimate
    assert dtype == jnp.float32 or estimate <= 1.05 * hopper
