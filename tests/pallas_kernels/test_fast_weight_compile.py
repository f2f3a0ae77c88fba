"""The TPU compiler takes the kernel of fast weights on every chip, forward and backward, within the footprint it carries."""

import functools
import json
import sys

import pytest
from tpu_program import TOPOLOGIES, lines, needs_compiler, one_device

SHAPES = {  # tokens of a chunk, head size
    "one": [("titans", (64, 64))],
    "small": [("titans", (64, 64)), ("ttt", (16, 24)), ("delta", (64, 64))],
    "wide": [("titans", (64, 128)), ("ttt", (128, 128)), ("delta", (128, 128))],
}
ROWS, CHUNKS, HEADS = 2, 4, 2


def main(chip: str, shapes: str) -> None:
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding
    from test_fast_weight_kernel import given, kind_of

    from pallas_kernels.fast_weight.op import Course, fast_weight

    with one_device(chip) as device:
        on = lambda tree: jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
        )
        for name, (chunk, dim) in SHAPES[shapes]:
            arrays = jax.eval_shape(functools.partial(given, name, CHUNKS * chunk, ROWS, HEADS, dim, expand=4))
            flags = jax.ShapeDtypeStruct((ROWS, CHUNKS), bool)

            def step(arrays, begins, name=name, chunk=chunk):
                state, first, fixed, *rows, gates = arrays
                course = Course(begins, ~begins, begins.any(axis=0), first)
                found = fast_weight(kind_of(name, fixed), state, *rows, gates, chunk=chunk, course=course)
                return sum(jnp.sum(x * x) for x in jax.tree.leaves(found))

            program = jax.jit(jax.grad(step)).lower(*on((arrays, flags))).compile()
            print(json.dumps({"name": name, "kernels": program.as_text().count("tpu_custom_call")}), flush=True)


def check(chip: str, shapes: str) -> None:
    done = lines(__file__, chip, shapes)
    assert [line["name"] for line in done] == [name for name, _ in SHAPES[shapes]]
    assert all(line["kernels"] >= 2 for line in done)


@needs_compiler
def test_compiles():
    check("v5e", "one")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_every_kind_compiles_on_every_chip(chip):
    check(chip, "small")


@needs_compiler
@pytest.mark.slow
def test_wide_heads_compile():
    check("v5e", "wide")


if __name__ == "__main__":
    main(*sys.argv[1:])
