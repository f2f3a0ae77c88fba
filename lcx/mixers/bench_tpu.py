"""The forms of a fast weight beside each other, as the TPU compiler has them: needs no TPU, but the `tpu` extra.

    python -m lcx.mixers.bench_tpu

Forward and backward of 16 heads of 64, one row, chunks of 64, compiled for a v5e: temporaries of 16,384 tokens, and the bytes
that one chunk reads and writes in device memory, as the compiler counts a program of one chunk, beside its products.
"""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from pallas_kernels.fast_weight.coefficients import decayed, mini_batch
from pallas_kernels.fast_weight.network import Fixed, Network, Weights
from pallas_kernels.fast_weight.op import FastWeight, State, fast_weight
from pallas_kernels.fast_weight.traced import work

LENGTH, HEADS, DIM, CHUNK = 1 << 14, 16, 64, 64
PEAK, BANDWIDTH = 197e12 / 6, 0.82e12  # of a v5e: float32 products are six of bfloat16


def _decayed(step, keep, momentum, gradient="start"):
    return decayed(step, keep, momentum, gradient=gradient)


KINDS = {  # what it is, sizes of its matrices, biases, momentum
    "Titans, two matrices": (FastWeight(Network(output="gain"), _decayed, None, 1.0, 100.0), (DIM, 4 * DIM, DIM), False, True),
    "TTT-MLP": (
        FastWeight(Network("gelu_tanh", "norm"), lambda step, *_: mini_batch(step, step)),
        (DIM, 4 * DIM, DIM),
        True,
        False,
    ),
    "gated DeltaNet": (FastWeight(Network(), functools.partial(_decayed, gradient="decayed")), (DIM, DIM), False, False),
}


def step(name: str, form: str, length: int):
    """(gradient of a row by everything, shapes of its arrays)."""
    kind, sizes, biases, momentum = KINDS[name]
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    pairs = list(itertools.pairwise(sizes))
    weights = Weights(
        tuple(like(1, HEADS, *pair) for pair in pairs),
        tuple(like(1, HEADS, pair[1]) for pair in pairs) if biases else (),
        like(1, HEADS, DIM) if kind.network.output == "gain" else None,
    )
    fixed = Fixed(like(HEADS, DIM), like(HEADS, DIM)) if kind.network.output == "norm" else None
    row, gate = like(1, length, HEADS, DIM), like(1, length, HEADS)
    gates = gate, gate, gate if momentum else None
    arrays = State(weights, weights if momentum else None), fixed, row, row, row, gates

    def loss(arrays):
        state, fixed, *rows, gates = arrays
        found = fast_weight(kind._replace(fixed=fixed), state, *rows, gates, chunk=CHUNK, form=form)
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(found))

    return jax.grad(loss), arrays


def table(device: jax.Device) -> str:
    lines = [
        "| memory | form | temporaries MiB | bytes a chunk and head | products, MFLOP | at the least, us: bytes, products |",
        "|---|---|---:|---:|---:|---|",
    ]
    on = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), tree
    )
    for name in KINDS:
        for form in ("xla", "tpu"):
            run, arrays = step(name, form, LENGTH)
            temporaries = jax.jit(run).lower(on(arrays)).compile().memory_analysis().temp_size_in_bytes
            run, arrays = step(name, form, CHUNK)
            moved = jax.jit(run).lower(on(arrays)).compile().cost_analysis()["bytes accessed"] / HEADS
            flops = work(step(name, "xla", CHUNK)[0], arrays).flops / HEADS
            lines.append(
                f"| {name} | {form} | {temporaries / 2**20:,.0f} | {moved:,.0f} | {flops / 1e6:.1f} "
                f"| {1e6 * moved / BANDWIDTH:.1f}, {1e6 * flops / PEAK:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    jax.config.update("jax_platforms", "cpu")
    from lcx.parallel.topology import topology_devices

    device = topology_devices("v5e:1x1")[0]
    with jax.set_mesh(Mesh(np.array([device]), ("one",))):
        print(table(device))
