"""The TPU compiler takes the kernels on every chip, within the vector memory that `blocks.footprint` says they need.

Run as a program for one chip it compiles for a described device and prints a line for each kernel. What is compiled carries its
footprint as the limit of vector memory, so that too low an estimate is refused by the compiler.
"""

import json
import sys
import time

import pytest
from tpu_program import CHIPS, lines, needs_compiler, one_device

LONG = {"T": 16384, "H": 64, "K": 16, "D": 128}  # its arrays do not fit the vector memory as a whole
PLANNED = 8192
SHORT = {"T": 512, "H": 4, "K": 2, "D": 64}


def cases(chip, what):
    """Name, mask, shape, dtype and options of what is compiled for a chip: the masks on one of them, or `more`."""
    import jax.numpy as jnp
    import numpy as np

    from lcx.attention.mask import Beyond, Causal, Chunk, Hide, Sink, Window, Within
    from pallas_kernels.tile_attention.blocks import Blocks
    from pallas_kernels.tile_attention.tokens import Bias

    small = {"blocks": Blocks.same(128, 128)}
    if what == "more":
        yield "float32 and softcap", Causal(), {**LONG, "T": 512, "D": 192}, jnp.float32, {"softcap": 30.0, **small}
        yield "one head of 256", Causal(), {**LONG, "K": 64, "D": 256}, jnp.bfloat16, {}
        yield "a long list", Causal(), {**SHORT, "T": 128 * 520}, jnp.bfloat16, small
        return
    yield "chosen blocks", Causal(), LONG, jnp.bfloat16, {}
    if chip != "v5e":
        yield "chunk", Chunk(size=100), SHORT, jnp.bfloat16, small
        return
    for mask in (
        Window(size=100) | Sink(size=4),
        Chunk(size=100) & Beyond(size=3),
        Within(size=9) & Hide(query_role=1, key_role=0),
    ):
        yield repr(mask), mask, SHORT, jnp.bfloat16, small
    yield "bias", Causal(), SHORT, jnp.bfloat16, {"bias": Bias(np.full((1, 512, 4), 0.5, np.float32), "index"), **small}


def compiled(device, mask, shape, dtype, options):
    """Compiles forward and backward, and checks what the compiler was told."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels.tile_attention import tpu
    from pallas_kernels.tile_attention.tokens import Tokens

    T, H, K, D = shape.values()
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    tokens = Tokens(*(array(1, T, dtype=jnp.int32),) * 4)
    given = array(1, T, H, D), array(1, T, K, D), array(1, T, K, D), tokens, tokens
    rows = *(array(1, T, H, dtype=jnp.float32),) * 2, array(1, T, H, D, dtype=jnp.float32)
    for form, inputs in ((tpu.forward, given), (tpu.backward, (*given, *rows))):
        run = lambda *inputs, form=form: form(*inputs, mask=mask, scale=0.1, **options)
        yield jax.jit(run).lower(*inputs).compile()


def planned(device):
    """Compiles attention over a block plan, forward and backward: lists of key heads, cut into ranges, and columns."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from lcx.attention.mask import Causal
    from lcx.attention.plan import BlockPlan
    from lcx.attention.planned import Planned
    from pallas_kernels.tile_attention import tile_list
    from pallas_kernels.tile_attention.tokens import Tokens

    tile_list.ENTRIES = 4000  # a sort of as many tiles as scalar memory holds takes 15 s to compile
    T, H, K, D = {**SHORT, "T": PLANNED}.values()
    blocks, block = T // 128, (128, 128)
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
    tiles = {
        name: array(1, K, blocks * blocks, dtype=dtype)
        for name, dtype in (("rows", jnp.int32), ("cols", jnp.int32), ("kind", jnp.int8))
    }
    columns = {"columns": array(1, K, blocks, 64), "column_count": array(1, K, blocks)}
    plan = BlockPlan(**tiles, count=array(1, K), overflow=array(1, K), **columns, block=block, lengths=(T, T))
    tokens = Tokens(*(array(1, T),) * 4)
    wide = lambda heads, dtype=jnp.bfloat16: array(1, T, heads, D, dtype=dtype)
    given = wide(H), wide(K), wide(K), tokens, tokens
    rows = *(array(1, T, H, dtype=jnp.float32),) * 2, wide(H, jnp.float32)
    fold = Planned("tpu", Causal(), 0.1, None, block)
    yield jax.jit(fold.forward).lower(*given, plan).compile()
    yield jax.jit(fold.backward).lower(*given, *rows, plan).compile()


def main(chip, what="kernels"):
    with one_device(chip) as device:
        if what == "plan":
            start = time.perf_counter()
            memory = [program.memory_analysis().temp_size_in_bytes for program in planned(device)]
            print(json.dumps({"temporaries": memory, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
            return
        for name, *case in cases(chip, what):
            start, flops = time.perf_counter(), []
            for program in compiled(device, *case):
                flops.append(program.cost_analysis()["flops"])
            print(json.dumps({"name": name, "flops": flops, "seconds": round(time.perf_counter() - start, 1)}), flush=True)


@needs_compiler
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles(chip):
    done = lines(__file__, chip)
    assert len(done) == (5 if chip == "v5e" else 2)
    T, _, D = LONG["T"], LONG["K"], LONG["D"]
    pairs = T * T * LONG["H"]  # the estimate is of all tiles
    for flops, products in zip(done[0]["flops"], (2, 7), strict=True):
        assert 1 <= flops / (2 * products * D * pairs) < 1.05


@pytest.mark.slow
@needs_compiler
def test_wide_heads_float32_and_long_lists_compile():
    assert len(lines(__file__, "v5e", "more")) == 3


@pytest.mark.slow
@needs_compiler
def test_a_plan_compiles():
    """Nothing in it is as large as a mask of all pairs."""
    (done,) = lines(__file__, "v5e", "plan")
    assert max(done["temporaries"]) < PLANNED * PLANNED


if __name__ == "__main__":
    main(*sys.argv[1:])
