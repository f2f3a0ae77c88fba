"""Bytes that a step of decoding reads of coded slots, as the TPU compiler has it: needs no TPU, but the `tpu` extra.

    python -m pallas_kernels.quantized_attention.bench_tpu v5e v5p v6e

One row of 32,768 slots, 8 key heads of 128, 4 query heads each. Held: codes and what stands beside them, in bytes a slot and
head, keys and values together. Read: what the compiler says that the whole program reads and writes, of which the kernel's
part is its own estimate, each input once.
"""

import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array

from pallas_kernels import angles
from pallas_kernels.quantized_attention import tpu
from pallas_kernels.quantized_attention.formats import (
    Arrays,
    ChannelGroups,
    Codebook,
    CodebookArrays,
    Format,
    GroupArrays,
    NumberArrays,
    Numbers,
    Plan,
    Scaled,
    ScaledArrays,
    Slots,
    TokenGroups,
    Turning,
)
from pallas_kernels.quantized_attention.packing import BLOCK, PLANES
from pallas_kernels.tile_attention.tokens import Tokens

B, S, K, GROUP, D = 1, 32768, 8, 4, 128
CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
WITHOUT_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
FORMS = {
    "bfloat16": (Numbers(), Numbers()),
    **{kind: (Scaled(kind), Scaled(kind)) for kind in ("int8", "fp8")},
    **{f"groups of 32 channels, {bits} bits": (ChannelGroups(bits, 32),) * 2 for bits in (2, 3, 4, 8)},
    **{f"groups of 32 tokens, {bits} bits": (TokenGroups(bits, 32), ChannelGroups(bits, 32)) for bits in (2, 3, 4, 8)},
    **{f"codebook of {bits} bits": (Codebook(bits),) * 2 for bits in (2, 3, 4)},
    "codebook of 3 bits, raw keys": (Codebook(3),) * 2,
}


class Everything:
    """The mask of slots that are there."""

    def visible(self, q: Tokens, k: Tokens) -> Array:
        return (q.segments != 0) & (k.segments != 0) & (k.order <= q.order)


def arrays(form: Format, keys: bool, array) -> Arrays:
    """Shapes of what a format holds."""
    if isinstance(form, Numbers):
        return NumberArrays(array(jnp.bfloat16, S, D))
    if isinstance(form, Scaled):
        return ScaledArrays(array(jnp.int8 if form.kind == "int8" else jnp.float8_e4m3fn, S, D), array(jnp.float32, S))
    planes = tuple(array(jnp.uint32, S // BLOCK * width, D) for width in PLANES[form.bits])
    if isinstance(form, Codebook):
        own = lambda kind: (array(kind, S),) * 2
        ranges = {"by_channel": array(jnp.float32, 2, D)} if keys else {"by_token": own(jnp.uint16)}
        return CodebookArrays(planes, array(jnp.float32, 2**form.bits), own(jnp.uint16)[:1], own(jnp.uint16), **ranges)
    if isinstance(form, ChannelGroups):
        return GroupArrays(planes, *((array(jnp.uint16, S),) * (D // form.size),) * 2)
    return GroupArrays(planes, *(array(jnp.uint16, S // form.size, D),) * 2)


def compiled(device: jax.Device, name: str, T: int = 1):
    """(program, bytes held as codes) of one step."""
    one = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind, sharding=SingleDeviceSharding(device))
    array = lambda kind, *shape: one(kind, B, K, *shape)
    forms = FORMS[name]
    plan = Plan(*forms, Everything(), D**-0.5)
    held = [arrays(form, keys, array) for form, keys in zip(forms, (True, False), strict=True)]
    tokens = Tokens(*(one(jnp.int32, B, 1, S),) * 4)
    slots = Slots(*held, tokens, one(jnp.int32, B))
    given = one(jnp.bfloat16, B, T, K * GROUP, D), slots, Tokens(*(one(jnp.int32, B, T),) * 4)

    def run(q, slots, q_tokens):
        if name.endswith("raw keys"):
            parts = jnp.stack(angles.parts(jnp.float32(10000.0) ** -(jnp.arange(D // 2) / (D // 2)) / (2 * jnp.pi)))
            position = slots.tokens.index[:, 0].astype(jnp.float32)
            slots = slots._replace(turning=Turning(position, parts, jnp.float32(1.0)))
        return tpu.forward(plan, q, slots, q_tokens)

    return jax.jit(run).lower(*given).compile(), sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(held))


def main(chips: list[str]) -> None:
    if not chips or not set(chips) <= set(CHIPS):
        sys.exit(__doc__)
    for name, value in WITHOUT_TPU.items():
        os.environ.setdefault(name, value)
    print("| chip | format | held bytes | read bytes | read / held |\n|---|---|---:|---:|---:|")
    for chip in chips:
        options = {"chips_per_host_bounds": [1, 1, 1]} if CHIPS[chip].endswith("1") else {}
        device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip], **options).devices[0]
        with jax.set_mesh(jax.sharding.Mesh([device], ("one",))):
            for name in FORMS:
                program, held = compiled(device, name)
                read, each = program.cost_analysis()["bytes accessed"], B * K * S
                print(f"| {chip} | {name} | {held / each:.1f} | {read / each:.1f} | {read / held:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
