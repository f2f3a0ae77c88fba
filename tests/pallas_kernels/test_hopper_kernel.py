"""The Hopper kernels, their warpgroups run as threads, equal the float32 reference in value and gradient, and they lower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import MASKS, arrays, compare, listed, random_tokens, whole_document, with_gradient
from hopper_in_threads import emulate

from lcx.attention.mask import Causal
from pallas_kernels.tile_attention import gpu, hopper, reference
from pallas_kernels.tile_attention.blocks import Shape
from pallas_kernels.tile_attention.hopper_blocks import SHARED, TARGETS, Blocks, Passing, choose_blocks, shared_bytes
from pallas_kernels.tile_attention.tokens import Tokens

SMALL = Blocks(Passing(64, 2), Passing(64, 2), Passing(64, 2))
ODD = Blocks(Passing(128, 1), Passing(64, 3), Passing(64, 1))


def both(given, form=hopper, allowed=None, own=None, **options):
    """(out, lse, dq, dk, dv) of the kernels, with options of their `own`, and of the reference on the same bfloat16 values."""
    q, k, v, d_out, d_lse, *tokens = given
    out, lse = form.forward(q, k, v, *tokens, **options, **(own or {}))
    delta = jnp.where(jnp.isneginf(lse), 0, jnp.sum(d_out * out, axis=-1) - d_lse)
    got = out, lse, *form.backward(q, k, v, *tokens, lse, delta, d_out, **options, **(own or {}))
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    dense = functools.partial(reference.forward, **options, allowed=allowed)
    return got, with_gradient(dense)(*wide, d_out, d_lse, *tokens)


@pytest.mark.parametrize(
    "mask, heads, widths, softcap, kind, blocks",
    [
        pytest.param(MASKS[0], (2, 2), (64, 64), None, "packed", SMALL, id="causal"),
        pytest.param(MASKS[1], (4, 2), (128, 40), 2.0, "special", ODD, marks=pytest.mark.slow, id="window or sink"),
        pytest.param(MASKS[2], (3, 1), (40, 64), None, "shuffled", SMALL, marks=pytest.mark.slow, id="chunk"),
        pytest.param(MASKS[3], (2, 1), (64, 64), None, "padding", None, marks=pytest.mark.slow, id="beyond"),
        pytest.param(MASKS[0], (2, 1), (256, 128), None, "packed", SMALL, marks=pytest.mark.slow, id="wide"),
    ],
)
def test_equals_the_reference(mask, heads, widths, softcap, kind, blocks, monkeypatch):
    emulate(monkeypatch)
    rng = np.random.default_rng(0)
    given = arrays(rng, 1, 141, 201, *heads, *widths, jnp.bfloat16)
    got, expected = both(
        (*given, random_tokens(rng, 1, 141, kind), random_tokens(rng, 1, 201, kind)),
        mask=mask,
        scale=0.2,
        softcap=softcap,
        own={"blocks": blocks},
    )
    compare(got, expected, 1e-2)


@pytest.mark.parametrize("groups", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_lists_of_tiles_equal_the_reference(groups, monkeypatch):
    """One list for all heads, for each key head or each query head; full and partial tiles, rows without any."""
    emulate(monkeypatch)
    monkeypatch.setattr(gpu, "takes", lambda *call: True)
    given, tiles, pairs = listed(groups, 141, 201)
    got, expected = both(given, gpu, pairs, {"tiles": tiles, "tile": (128, 128)}, mask=Causal(), scale=0.1)
    compare(got, expected, 1e-2)


@pytest.mark.parametrize(
    "mask, D, E, backward",
    [(MASKS[1], 128, 128, 2), pytest.param(MASKS[2], 256, 40, 3, marks=pytest.mark.slow)],
    ids=["window or sink", "chunk"],
)
def test_lowers_for_cuda(mask, D, E, backward):
    """Chosen blocks; one kernel forward, two or for wide heads three backward."""
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    tokens = Tokens(*(array(2, 1000, dtype=jnp.int32),) * 4)
    given = array(2, 1000, 8, D), array(2, 1000, 2, D), array(2, 1000, 2, E), tokens, tokens
    rows = *(array(2, 1000, 8, dtype=jnp.float32),) * 2, array(2, 1000, 8, E, dtype=jnp.float32)
    options = {"mask": mask, "scale": 0.1, "softcap": 30.0}
    for run, inputs, kernels in ((hopper.forward, given, 1), (hopper.backward, (*given, *rows), backward)):
        lowered = jax.jit(functools.partial(run, **options)).trace(*inputs).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @mosaic_gpu") == kernels


def test_what_does_not_fit_is_named():
    shape = Shape(500, 500, 1, 128, 128)
    blocks = TARGETS[128]
    assert choose_blocks(shape) == choose_blocks(shape, blocks) == blocks
    with pytest.raises(ValueError, match=r"forward = \(128, 3\) with heads of 128 and 128 takes 233 KiB .* at most 227"):
        choose_blocks(shape, blocks._replace(forward=Passing(128, 3)))
    with pytest.raises(ValueError, match=r"key_gradient = \(96, 2\): expected a multiple of 64 tokens"):
        choose_blocks(shape, blocks._replace(key_gradient=Passing(96, 2)))
    with pytest.raises(ValueError, match="float32, bfloat16, float32: expected one"):
        q, k, v, *_ = arrays(np.random.default_rng(0), 1, 500, 500, 2, 1, 64, 64)
        hopper.forward(q, k.astype(jnp.bfloat16), v, *(whole_document(1, 500),) * 2, mask=Causal(), scale=1.0)


def test_the_estimate_bounds_what_the_compiler_allocates():
    """Bytes that Mosaic GPU allocated for the forward kernel (jax 0.11.2, an H200), and that all chosen blocks fit."""
    for passing, allocated in ((Passing(192, 2), 237_656), (Passing(128, 3), 237_688)):
        assert allocated <= shared_bytes("forward", 128, 128, passing) <= 1.01 * allocated
    for width in TARGETS:
        for name, passing in choose_blocks(Shape(1, 1, 1, width, width))._asdict().items():
            assert shared_bytes(name, width, width, passing) <= SHARED
