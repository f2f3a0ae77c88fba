"""Bytes that a token of an answer moves a slot, as the TPU compiler has it: needs no TPU, but the `tpu` extra.

    python -m lcx.bench_serving v5e v5p v6e
    python -m lcx.bench_serving encode v5p

A model of sixteen layers with the heads of Llama-3-8B, scanned, answers one row. The compiler counts a turn of the scan once,
so what a program behind more slots moves beyond one behind fewer is what a layer reads and writes of them. Codes: keys and
values as they are held, a slot; with what is known of its token, all that is held.
encode: 65,536 tokens of 8 key heads on one chip, bytes moved a token and head, by the kernel and as XLA codes (all but
the packing), beside those needed, tokens in bfloat16 read once and codes written once.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lcx.cache.cache import Cache
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.plain import Plain
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.channels.glu import GLU
from lcx.inference.serving import Serving
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parallel.topology import topology_devices
from lcx.serving_plan import answers_program

CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1"}
SLOTS = 65536, 131072
CACHES: dict[str, Cache] = {
    "dense cache, bfloat16": DenseCache(),
    "plain slots, bfloat16": KVCache(),
    "int8": KVCache(codec=Int8()),
    "fp8": KVCache(codec=Fp8()),
    "int4 groups": KVCache(codec=IntGroups()),
    "KIVI, 2 bits": KVCache(codec=KIVI()),
    "KVQuant, 3 bits": KVCache(codec=KVQuant(bits=3, codebook="uniform"), keys="raw"),
    "KVQuant, 2 bits, no outliers": KVCache(codec=KVQuant(bits=2, codebook="uniform", outliers=0.0), keys="raw"),
}


def moved(cache: Cache, slots: int, devices: list[jax.Device]) -> tuple[float, float, float]:
    """Bytes that a token moves, and of a layer: its codes, its state."""
    layer = Layer(mixer=Attention(heads=32, kv_heads=8, head_dim=128, cache=cache), channel=GLU(hidden=4096))
    model = Decoder(vocab=1024, width=4096, pattern=(layer,), periods=16, compute="bfloat16")
    serving = Serving(model=model, rows=1, prompt=slots - 4096, answer=4096, chunk=256)
    program, states = answers_program(serving, devices)
    size = lambda tree: sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)) / model.periods
    (state,) = states["layers"]
    held = getattr(state, "held", state)
    return program.cost_analysis()["bytes accessed"], size((held.k, held.v)), size(state)


def encoded(
    cache: KVCache, device: jax.Device, plainly: bool, tokens: int = 1 << 16, heads: int = 8, size: int = 128
) -> tuple[float, float]:
    """Bytes that are moved, and needed, to code keys and values, a token and head. plainly: as XLA has it."""
    tables = jax.tree.map(lambda x: jnp.asarray(x)[None], cache.codec.tables(0, heads, size, size))
    code = lambda coder, x, known: coder.tightened(coder.loose(x, known), known) if plainly else coder.encode(x, known)
    run = lambda *tokens: [code(*each) for each in zip(cache.coders, tokens, tables, strict=True)]
    given = jax.ShapeDtypeStruct((1, heads, tokens, size), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    with jax.set_mesh(jax.sharding.Mesh([device], ("one",))):
        program = jax.jit(run).lower(given, given).compile()
    codes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.out_info))
    each = tokens * heads
    return program.cost_analysis()["bytes accessed"] / each, codes / each + 4 * size


def encoding(chips: list[str]) -> None:
    print("| chip | cache | moved | by XLA | needed |\n|---|---|---:|---:|---:|")
    for chip in chips:
        (device,) = topology_devices(CHIPS[chip])
        for name, cache in CACHES.items():
            if isinstance(cache, KVCache) and cache.codec != Plain():
                (moved, needed), (by_xla, _) = (encoded(cache, device, plainly) for plainly in (False, True))
                print(f"| {chip} | {name} | {moved:.0f} | {by_xla:.0f} | {needed:.0f} |", flush=True)


def main(chips: list[str]) -> None:
    if chips[:1] == ["encode"] and chips[1:] and set(chips[1:]) <= set(CHIPS):
        return encoding(chips[1:])
    if not chips or not set(chips) <= set(CHIPS):
        sys.exit(__doc__)
    print("| chip | cache | codes | held | moved | moved / codes |\n|---|---|---:|---:|---:|---:|")
    for chip in chips:
        devices = topology_devices(CHIPS[chip])
        for name, cache in CACHES.items():
            few, many = (moved(cache, slots, devices) for slots in SLOTS)
            step, codes, held = ((b - a) / (SLOTS[1] - SLOTS[0]) for a, b in zip(few, many, strict=True))
            print(f"| {chip} | {name} | {codes:.0f} | {held:.0f} | {step:.0f} | {step / codes:.3f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
