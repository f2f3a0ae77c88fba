"""Scores that fall linearly with distance: every form equals float64 loops in value, and the reference in gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import OneForm, arrays, compare, listed, random_tokens, whole_document, with_gradient
from jax.sharding import AxisType, PartitionSpec

from lcx.attention.mask import Causal, Sink, Window
from pallas_kernels.tile_attention import gpu_few, op, reference, tpu, triton, xla
from pallas_kernels.tile_attention.blocks import Blocks
from pallas_kernels.tile_attention.decay import Decay
from pallas_kernels.tile_attention.tokens import Bias, Tokens
from pallas_kernels.tile_attention.triton_blocks import Blocks as TritonBlocks

SLOPES = (0.5, 0.25, 0.01, 0.3)  # of four heads
MASK = Window(size=60) | Sink(size=3)
KINDS = ("packed", "special", "shuffled", "padding")
LISTS = (("tpu", 2), ("xla", 2), ("xla", 4), ("triton", 2))


def bias(B, T, along="index", slopes=SLOPES):
    return Bias(jnp.broadcast_to(jnp.array(slopes, jnp.float32), (B, T, len(slopes))), along)


def slow(*case, id):
    return pytest.param(*case, marks=pytest.mark.slow, id=id)


@pytest.mark.parametrize("along", ["index", "order"])
def test_the_reference_equals_float64_loops(along):
    rng = np.random.default_rng(0)
    q, k, v, *_ = arrays(rng, 2, 9, 14, 4, 2, 8, 5)
    q_tokens, k_tokens = random_tokens(rng, 2, 9, "shuffled"), random_tokens(rng, 2, 14, "shuffled")
    run = jax.jit(functools.partial(reference.forward, mask=MASK, scale=0.4, bias=bias(2, 9, along)))
    out, lse = run(q, k, v, q_tokens, k_tokens)
    seen = np.asarray(MASK.visible(q_tokens.rows(), k_tokens.columns()))
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    at, to = (np.asarray(getattr(tokens, along), np.float64) for tokens in (q_tokens, k_tokens))
    for b, t, h in np.ndindex(2, 9, 4):
        keys = np.flatnonzero(seen[b, t])
        if len(keys) == 0:
            assert lse[b, t, h] == -np.inf and not np.asarray(out[b, t, h]).any()
            continue
        s = k[b, keys, h // 2] @ q[b, t, h] * 0.4 - SLOPES[h] * abs(at[b, t] - to[b, keys])
        total = np.log(np.exp(s - s.max()).sum()) + s.max()
        np.testing.assert_allclose(lse[b, t, h], total, atol=2e-6)
        np.testing.assert_allclose(out[b, t, h], np.exp(s - total) @ v[b, keys, h // 2], atol=2e-6)


def test_the_dense_backward_is_the_gradient_of_the_dense_forward():
    options = {"mask": MASK, "scale": 0.4, "bias": bias(4, 15)}
    written = with_gradient(functools.partial(op.attention, OneForm(reference, **options)))
    derived = with_gradient(functools.partial(reference.forward, **options))
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        given = *arrays(rng, 4, 15, 20, 4, 2, 8, 5), random_tokens(rng, 4, 15, kind), random_tokens(rng, 4, 20, kind)
        compare(written(*given), derived(*given), 1e-6)


@pytest.mark.parametrize(
    "form, heads, options, along, dtype",
    [
        pytest.param(xla, 2, {"sizes": xla.Sizes(16, 32, 2)}, "index", jnp.float32, id="xla"),
        pytest.param(xla, 1, {"sizes": xla.Sizes(32, 16, 1)}, "order", jnp.bfloat16, id="xla, bfloat16"),
        pytest.param(tpu, 2, {"blocks": Blocks.same(128, 128), "interpret": True}, "index", jnp.float32, id="tpu"),
        slow(tpu, 1, {"blocks": Blocks.same(128, 256), "interpret": True}, "order", jnp.bfloat16, id="tpu, bfloat16"),
        pytest.param(triton, 2, {"blocks": TritonBlocks.same(32, 32), "interpret": True}, "index", jnp.float32, id="triton"),
        slow(triton, 1, {"blocks": TritonBlocks.same(32, 16), "interpret": True}, "order", jnp.bfloat16, id="triton, bfloat16"),
    ],
)
def test_every_form_equals_the_reference(form, heads, options, along, dtype):
    """Heads that share a key head in pairs and in fours; rows that are not multiples of a tile."""
    T, S = (201, 299) if form is tpu else (45, 101)
    own = {"mask": MASK, "scale": 0.2, "bias": bias(2, T, along)}
    tiled = with_gradient(functools.partial(op.attention, OneForm(form, **own, **options)))
    dense = with_gradient(functools.partial(reference.forward, **own))
    for seed, kind in enumerate(KINDS):
        rng = np.random.default_rng(seed)
        q, k, v, *rest = arrays(rng, 2, T, S, 4, heads, 64, 64, dtype)
        rest += random_tokens(rng, 2, T, kind), random_tokens(rng, 2, S, kind)
        exact = dense(*(x.astype(jnp.float32) for x in (q, k, v)), *rest)
        compare(tiled(q, k, v, *rest), exact, 3e-6 if dtype == jnp.float32 else 2e-2)


def test_full_tiles_have_it_too_at_positions_of_a_million():
    """Two tokens' distance is a difference of integers, so that it is exact however far from the start they are."""
    rng = np.random.default_rng(0)
    given, near = arrays(rng, 1, 96, 96, 4, 2, 64, 64), whole_document(1, 96)
    far = Tokens(near.index + 4_000_000, near.order + 4_000_000, near.segments, near.roles)
    own = {"mask": Causal(), "scale": 0.2, "bias": bias(1, 96)}
    expected = with_gradient(functools.partial(reference.forward, **own))(*given, near, near)
    tiled = with_gradient(functools.partial(op.attention, OneForm(xla, **own, sizes=xla.Sizes(32, 32, 1))))
    compare(tiled(*given, far, far), expected, 3e-6)


@pytest.mark.parametrize("form, groups", [("tpu", 4), *(slow(*case, id=str(case)) for case in LISTS)])
def test_lists_of_tiles(form, groups):
    """One list a key head, and one a query head, for which `gpu` gives the Triton form keys of its own."""
    given, tiles, pairs = listed(groups, 201, 299)
    q, k, v, *rest = (x.astype(jnp.float32) if getattr(x, "dtype", None) == jnp.bfloat16 else x for x in given)
    own = {"mask": Causal(), "scale": 0.2, "bias": bias(1, 201)}
    options = {
        "xla": {"sizes": xla.Sizes(128, 128, 1)},
        "tpu": {"blocks": Blocks.same(128, 128), "interpret": True},
        "triton": {"tile": (128, 128), "interpret": True},
    }[form]
    module = {"xla": xla, "tpu": tpu, "triton": triton}[form]
    tiled = with_gradient(functools.partial(op.attention, OneForm(module, **own, **options, tiles=tiles)))
    dense = with_gradient(functools.partial(reference.forward, **own, allowed=pairs))
    compare(tiled(q, k, v, *rest), dense(q, k, v, *rest), 3e-6)


@pytest.mark.slow
def test_few_queries_stack_their_heads():
    rng = np.random.default_rng(0)
    q, k, v, *_ = arrays(rng, 2, 3, 300, 4, 2, 64, 64)
    tokens = random_tokens(rng, 2, 3, "special"), random_tokens(rng, 2, 300, "special")
    own = {"mask": Causal(), "scale": 0.2, "bias": bias(2, 3)}
    got = jax.jit(functools.partial(gpu_few.forward, functools.partial(triton.forward, interpret=True), **own))(
        q, k, v, *tokens
    )
    compare_forward = zip(got, reference.forward(q, k, v, *tokens, **own), strict=True)
    assert all(np.allclose(a, b, atol=3e-6) for a, b in compare_forward)


def test_a_device_has_the_slopes_of_its_heads():
    """Heads over two axes, the second of them shared out later, as all-to-all does it."""
    decay = Decay(tuple(map(float, range(8))), "index", ("a",)).shared("b")

    def local(q):
        return decay.bias(q).slopes

    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(None, None, ("a", "b"))
    run = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(run(jnp.zeros((1, 3, 8, 4)))[0, 2], np.arange(8))
