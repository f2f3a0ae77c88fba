"""The TPU compiler's schedule of a ring: what travels starts before a tile kernel and ends after it, on every chip.

Run as a program for one chip it compiles forward and backward of a ring over a described slice and prints the permutes of its
loops. As seen with libtpu 0.0.42, of keys with values (4 MiB each here) and their gradients (8 MiB), forward and backward:

    chip           as it is    keys, values and four fields of tokens apart, no barrier
    v4             all         forward none; backward: keys and values behind dq, gradients behind dk, dv
    v5e            all         forward keys, not values; backward: keys and values behind dq, gradients behind dk, dv
    v5p            all         forward none; backward: keys and values behind dq, gradients behind no kernel
    v6e            all         forward none; backward: keys and values behind dq, gradients behind no kernel
    tpu7x          all         as v5e

The tokens (64 KiB) go behind kernels too. A ring of 4 around rings of 4 (v5e:4x4): all but the tokens of the outer ring's
backward pass; its keys and gradients behind no kernel while they travelled in four arrays. On v5e:8x8 the order of the chips
decides (lcx/parallel/device_order.py): in JAX's order, and in rows of the grid, every permute blocks.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

NESTED = "v5e:8x8"  # rings of 8 in a ring of 8
SLICES = {"v4": "v4:2x2x1", "v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x4", "tpu7x": "tpu7x:2x2x1"}
c, H, K, D = 4096, 8, 2, 128  # tokens a device, heads
KEYS, GRADIENTS, TOKENS = 2 * c * K * D * 2, 2 * c * K * D * 4, 4 * c * 4
FORWARD, BACKWARD = [TOKENS, KEYS], [TOKENS, KEYS, GRADIENTS]


def schedule(chip):
    """Of every loop that sends, the bytes of its permutes and how many kernels run behind them."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, __file__, chip], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
@pytest.mark.parametrize("chip", list(SLICES))
def test_what_travels_hides_behind_the_kernels(chip):
    loops = schedule(chip)
    assert sorted(sorted(size for size, _ in loop) for loop in loops) == [FORWARD, BACKWARD]
    assert all(kernels > 0 for loop in loops for _, kernels in loop)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler")
def test_rings_in_a_ring_hide_on_a_grid():
    """All but the tokens of the outer ring's backward pass, by the order in which the mesh takes the chips."""
    found = [permute for loop in schedule(NESTED) for permute in loop]
    assert {size for size, _ in found} == {KEYS, TOKENS, GRADIENTS}
    assert [size for size, kernels in found if kernels == 0] == [TOKENS]


def main(chip):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from lcx.attention.mask import Causal
    from lcx.attention.ring import Ring
    from lcx.attention.sharded import sharded_attend
    from lcx.batch import TokenInfo
    from lcx.parallel.hlo import overlaps
    from lcx.parallel.mesh import MeshSpec
    from lcx.parallel.rules import Rules
    from lcx.parallel.topology import topology_devices

    devices = topology_devices(SLICES.get(chip, chip))
    outer = 8 if chip == NESTED else 1
    mesh = MeshSpec(fsdp=outer, context=len(devices) // outer).build(devices)
    rules = Rules(batch=("data",), sequence=("fsdp", "context"))
    sharding = NamedSharding(mesh, PartitionSpec(None, rules.sequence))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((1, mesh.size * c, *shape), dtype, sharding=sharding)
    field = array(jnp.int32)
    info = TokenInfo(index=field, order=field, positions=array(jnp.float32, 1), segments=field, roles=field)
    options = {"rules": rules, "communication": Ring(), "mask": Causal(), "scale": 0.1}

    def both(q, k, v, info, *cotangents):
        return jax.vjp(lambda *x: sharded_attend(*x, info, info, **options), q, k, v)[1](cotangents)

    q, k = array(jnp.bfloat16, H, D), array(jnp.bfloat16, K, D)
    with jax.set_mesh(mesh):
        text = jax.jit(both).lower(q, k, k, info, array(jnp.float32, H, D), array(jnp.float32, H)).compile().as_text()
    loops = {}
    for found in overlaps(text):
        loops.setdefault(found.computation, []).append((found.bytes, len(found.kernels)))
    print(json.dumps(list(loops.values())))


if __name__ == "__main__":
    main(sys.argv[1])
