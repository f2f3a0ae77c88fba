"""The TPU compiler takes the kernel of coded slots, and what a step reads is what is held as codes.

Run as a program for one chip it compiles for a described device and prints a line for each call.
"""

import functools
import json
import sys

import pytest
from tpu_program import CHIPS, lines, needs_compiler, one_device

TOKENS = 1.1  # a step reads the tokens of the slots too, once for all heads


def decoding(device, every):
    """A step over 32,768 slots in every format, or every third: its bytes by those of the codes."""
    from pallas_kernels.quantized_attention import bench_tpu

    for name in [*bench_tpu.FORMS][:: 1 if every else 3]:
        program, held = bench_tpu.compiled(device, name)
        yield name, program.cost_analysis()["bytes accessed"] / held


def others():
    """Calls of more queries, of heads with tokens of their own, with all that is added to scores."""
    import jax.numpy as jnp
    from quantized_cases import CODECS, Case, made

    from lcx.attention.mask import Sink, Window

    added = {"softcap": 20.0, "sloped": True, "extra": True, "mask": Window(size=100) | Sink(size=4)}
    for case in (
        Case(CODECS["groups 4"], T=5, group=4, dtype=jnp.bfloat16, **added),
        Case(CODECS["groups 3"], T=2, by_head=True, rotary=128, pairing="interleaved", **added),
        Case(CODECS["kivi of 64"], S=2048, T=32, group=8, dtype=jnp.bfloat16, by_head=True, **added),
        Case(CODECS["kvquant of many outliers"], K=4, D=256, rotary=256, by_head=True, dtype=jnp.bfloat16, **added),
        Case(CODECS["fp8"], S=100, rotary=64, group=1, dtype=jnp.bfloat16),
        Case(CODECS["int8"], S=5000, K=32, T=3, group=1),
    ):
        yield repr(case), made(case)[0]


def compiled(device, plan, *given):
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.quantized_attention import tpu

    place = lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=SingleDeviceSharding(device))
    run = lambda *given: tpu.forward(plan, *given)
    return jax.jit(run).lower(*jax.tree.map(place, given)).compile()


def packed(device, bits):
    """Tokens packed and unpacked."""
    from pallas_kernels.quantized_attention.packing import pack, unpack

    codes = tokens(device, 1280, 256, "uint8")
    text = jax_text(lambda codes: unpack(pack(codes, bits), bits), codes)
    assert text.count("tpu_custom_call") >= 2


def encoded(device, few):
    """Keys and values coded, each side by one kernel, and fetched by another."""
    import jax
    import jax.numpy as jnp

    from lcx.cache.codecs.groups import KIVI, IntGroups
    from lcx.cache.codecs.kvquant import KVQuant
    from lcx.cache.codecs.scaled import Fp8, Int8
    from pallas_kernels.token_gather.op import gathered

    codebook = functools.partial(KVQuant, codebook="uniform")
    for codec in (KIVI(), codebook()) if few else (Int8(), Fp8(), IntGroups(), KIVI(), codebook(), codebook(outliers=0.05)):
        for size in (128,) if few else (128, 256):
            tables = jax.tree.map(lambda x: x[None], codec.tables(0, 8, size, size))
            for coder, known in zip((codec.keys, codec.values), tables, strict=True):
                text = jax_text(lambda x, coder=coder, known=known: coder.encode(x, known), tokens(device, 512, size))
                passes = 1 if size == 128 or isinstance(codec, Int8 | Fp8) else 2
                assert text.count('custom_call_target="tpu_custom_call"') == passes, (codec, size)
        yield repr(codec)
    more = ("int8", "uint8", "uint16", "float32", "int32", *(("float8_e4m3fn",) if chip_has_fp8() else ()))
    for dtype in ("bfloat16", *(() if few else more)):
        few = tokens(device, 1280, 128, dtype), tokens(device, 1280, 1, dtype)
        index = jax.ShapeDtypeStruct((1, 8, 640), jnp.int32, sharding=few[0].sharding)
        text = jax_text(lambda few, index: gathered(few, index, growing=True), few, index)
        assert text.count("tpu_custom_call") == 1
        yield f"gathered {dtype}"


def chip_has_fp8():
    from pallas_kernels.tpu_chips import this_chip

    return this_chip() != "v4"


def tokens(device, count, channels, dtype="bfloat16"):
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    return jax.ShapeDtypeStruct((1, 8, count, channels), jnp.dtype(dtype), sharding=SingleDeviceSharding(device))


def jax_text(run, *given):
    import jax

    return jax.jit(run).lower(*given).compile().as_text()


def main(chip, what="decoding"):
    calls = list(others()) if what == "others" else []
    with one_device(chip) as device:
        for name, given in calls:
            if chip == "v4" and "KIVI" in name:  # does not fit its vector memory
                continue
            compiled(device, *given)
            print(json.dumps({"name": name}), flush=True)
        for bits in (2, 3, 4, 8) if what == "others" else ():
            packed(device, bits)
            print(json.dumps({"name": f"{bits} bits"}), flush=True)
        for name in encoded(device, what == "encoding") if what.startswith("encoding") else ():
            print(json.dumps({"name": name}), flush=True)
        for name, ratio in decoding(device, what == "all decoding") if what.endswith("decoding") else ():
            print(json.dumps({"name": name, "ratio": ratio}), flush=True)


def within(done):
    for line in done:
        assert 1 <= line["ratio"] < TOKENS, line


@needs_compiler
def test_reads_codes():
    done = lines(__file__, "v5e", "decoding")
    assert len(done) == 5
    within(done)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_reads_codes_of_every_kind(chip):
    done = lines(__file__, chip, "all decoding")
    assert len(done) == 15
    within(done)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_other_calls_compile(chip):
    assert len(lines(__file__, chip, "others")) == (9 if chip == "v4" else 10)


@needs_compiler
def test_writes_codes():
    assert len(lines(__file__, "v5e", "encoding")) == 3


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_writes_codes_of_every_kind(chip):
    assert len(lines(__file__, chip, "encodings")) == (12 if chip == "v4" else 13)


if __name__ == "__main__":
    main(*sys.argv[1:])
