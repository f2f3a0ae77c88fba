"""The TPU kernel, interpreted, equals the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantized_cases import CODECS, Case, close, made

from lcx.attention.mask import Sink, Window
from lcx.cache.codecs.kvquant import KVQuant
from pallas_kernels.quantized_attention import gpu, packing_tpu, reference, tpu
from pallas_kernels.quantized_attention.packing import PLANES, pack

MASK = Window(size=400) | Sink(size=4)


def both(case, tile=512, tolerance=1e-5):
    given, _ = made(case)
    got = jax.jit(lambda *x: tpu.forward(given[0], *x, tile=tile, interpret=True))(*given[1:])
    close(got, reference.forward(*given), tolerance)
    return got


OFTEN = ("plain", "int8", "groups 3", "kivi 2", "kvquant 3")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in CODECS])
def test_every_format(name):
    """Odd numbers of used slots in tiles of which the last is not whole, rows that see nothing, NaN in empty slots."""
    tile = 1024 if name == "kivi of 64" else 512
    out, lse = both(Case(CODECS[name], S=2 * tile - 256, T=5, mask=MASK), tile)
    assert np.isneginf(lse).any() and not np.asarray(out)[np.isneginf(lse)].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(CODECS["groups 4"], group=1, by_head=True),
        Case(CODECS["groups 2"], group=8, softcap=3.0, sloped=True, extra=True),
        Case(CODECS["kivi 4"], group=4, T=5, extra=True),
        Case(CODECS["int8"], S=100, group=4, sloped=True, by_head=True, mask=MASK),
        Case(CODECS["kvquant 3"], rotary=128, T=5, by_head=True),
        Case(CODECS["kvquant 2"], rotary=64),
        Case(CODECS["groups 3"], rotary=128, pairing="interleaved", extra=True),
        Case(CODECS["fp8"], rotary=64, pairing="interleaved"),
        Case(CODECS["int8"], rotary=128, tables=True),
        Case(CODECS["kivi 3"], S=512, D=256, group=1),
        Case(KVQuant(codebook="uniform", bits=2, outliers=0.02), S=512, K=4, D=256, group=1),
        Case(CODECS["kvquant 3"], S=512, K=4, group=1),
    ],
    ids=repr,
)
def test_heads_and_what_is_added(case):
    both(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(CODECS["kivi 2"], S=512, by_head=True),
        pytest.param(Case(CODECS["kvquant 3"], S=512, rotary=128), marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_rows_of_all_layers(case):
    """Slots of three layers, of which the second is meant: as it alone, tables and what is added its own."""
    (plan, q, slots, *rest), _ = made(case)
    every = lambda tree, own=lambda x: False: jax.tree.map(lambda x: x if own(x) else jnp.concatenate([x[::-1], x, x]), tree)
    shared = lambda x: x.dtype == jnp.float32  # codebooks and ranges of channels
    turning = slots.turning and slots.turning._replace(positions=every(slots.turning.positions))
    some = {"k": every(slots.k, shared), "v": every(slots.v, shared), "tokens": every(slots.tokens), "turning": turning}
    layers = slots._replace(**some, first=jnp.int32(2))
    kernel = jax.jit(lambda slots: tpu.forward(plan, q, slots, *rest, tile=256, interpret=True))
    wanted = kernel(slots)
    for found in (
        kernel(layers),
        reference.forward(plan, q, layers, *rest),
        gpu.forward(plan, q, layers, *rest, interpret=True),
    ):
        close(found, wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["groups 4", "kivi 4", "kvquant 4", "fp8"])
def test_bfloat16_queries(name):
    """Codes are whole in bfloat16; what is rounded is what attention in bfloat16 rounds."""
    both(Case(CODECS[name], S=512, T=2, dtype=jnp.bfloat16), tolerance=2e-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packs_as_xla_does(bits):
    for tokens, channels in ((96, 128), (512, 256)):
        codes = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (2, tokens, channels)), jnp.uint8)
        words = packing_tpu.pack(codes, PLANES[bits], interpret=True)
        for found, wanted in zip(words, pack(codes, bits), strict=True):
            np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(packing_tpu.unpack(words, PLANES[bits], interpret=True), codes)
    assert packing_tpu.taken(96, 128) and packing_tpu.taken(1280, 256)
    assert not packing_tpu.taken(1056, 128) and not packing_tpu.taken(96, 64)


def test_what_is_not_taken_is_refused():
    for case, said in ((Case(CODECS["int8"], D=64), "multiples of 128"), (Case(CODECS["int8"], T=400), "1 to 256")):
        given, _ = made(case)
        with pytest.raises(ValueError, match=said):
            tpu.forward(*given)
