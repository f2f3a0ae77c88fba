"""The Triton kernel, interpreted, equals the float32 reference, and it lowers to Triton for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import described
from quantized_cases import CODECS, Case, close, made

from lcx.attention.mask import Sink, Window
from lcx.cache.codecs.groups import KIVI
from pallas_kernels.quantized_attention import gpu, reference

MASK = Window(size=300) | Sink(size=4)


def both(case, tolerance=3e-6):
    given, _ = made(case)
    got = jax.jit(lambda *x: gpu.forward(given[0], *x, interpret=True))(*given[1:])
    close(got, reference.forward(*given), tolerance)
    return got


OFTEN = ("int8", "groups 3", "kivi 2", "kvquant 3")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in CODECS])
def test_every_format(name):
    """Parts without a used slot, rows that see nothing, NaN in empty slots."""
    out, lse = both(Case(CODECS[name], S=448, T=5, mask=MASK))
    assert np.isneginf(lse).any() and not np.asarray(out)[np.isneginf(lse)].any()


@pytest.mark.slow
def test_an_odd_number_of_outliers():
    (plan, q, slots, *rest), _ = made(Case(CODECS["kvquant of many outliers"], S=96, D=32))
    odd = lambda arrays: arrays._replace(number=arrays.number[:-1])
    slots = slots._replace(k=odd(slots.k))
    assert len(slots.k.number) == 3 and len(slots.k.place) == 2
    got = jax.jit(lambda *x: gpu.forward(plan, *x, interpret=True))(q, slots, *rest)
    close(got, reference.forward(plan, q, slots, *rest), 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(CODECS["groups 4"], S=96, group=1, by_head=True),
        Case(CODECS["groups 2"], S=416, group=8, softcap=3.0, sloped=True, extra=True),
        Case(KIVI(bits=4, group=4), S=416, group=4, D=32, T=5, extra=True),
        Case(CODECS["int8"], S=101, group=4, D=64, sloped=True, by_head=True, mask=MASK),
        Case(CODECS["kvquant 3"], S=416, rotary=128, T=5, by_head=True),
        Case(CODECS["kvquant 2"], S=416, rotary=64),
        Case(CODECS["groups 3"], S=416, rotary=128, pairing="interleaved", extra=True),
        Case(CODECS["fp8"], S=416, rotary=64, pairing="interleaved"),
        Case(CODECS["int8"], S=416, rotary=128, tables=True),
        Case(CODECS["groups 8"], S=416, dtype=jnp.bfloat16),
    ],
    ids=repr,
)
def test_heads_and_what_is_added(case):
    both(case, 3e-6 if case.dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize("name", CODECS)
def test_lowers_for_cuda(name):
    case = Case(CODECS[name], S=1024, K=2, group=4, softcap=20.0, sloped=True, extra=True, dtype=jnp.bfloat16)
    case = Case(**{**vars(case), "rotary": 128 if name.startswith("kvquant") else 0, "mask": MASK})
    (plan, *given), _ = made(case)
    with described("NVIDIA H200"):
        text = jax.jit(lambda *x: gpu.forward(plan, *x)).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


def test_what_is_not_taken_is_refused():
    for case, said in ((Case(CODECS["int8"], S=96, D=96), "powers of two"), (Case(CODECS["int8"], S=96, T=99), "1 to 64")):
        given, _ = made(case)
        with pytest.raises(ValueError, match=said):
            gpu.forward(*given)
