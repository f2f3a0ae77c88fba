"""Bytes that a token of an answer moves a slot, as the TPU compiler has it: needs no TPU, but the `tpu` extra.

    python -m lcx.bench_serving v5e v5p v6e

A model of sixteen layers with the heads of Llama-3-8B, scanned, answers one row. The compiler counts a turn of the scan once,
so what a program behind more slots moves beyond one behind fewer is what a layer reads and writes of them. Codes: keys and
values as they are held, a slot; with what is known of its token, all that is held.
"""

import sys

import jax
import jax.numpy as jnp

from lcx.cache.cache import Cache
from lcx.cache.codecs.groups import KIVI, IntGroups
from lcx.cache.codecs.kvquant import KVQuant
from lcx.cache.codecs.scaled import Fp8, Int8
from lcx.cache.dense import DenseCache
from lcx.cache.kv_cache import KVCache
from lcx.channels.glu import GLU
from lcx.inference.serving import Serving
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder
from lcx.models.layer import Layer
from lcx.parallel.topology import topology_devices
from lcx.serving_plan import program

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


def served(cache: Cache, slots: int, chunk: int) -> Serving:
    """The model with this cache, one row of so many tokens, 4,096 of them its answer."""
    layer = Layer(mixer=Attention(heads=32, kv_heads=8, head_dim=128, cache=cache), channel=GLU(hidden=4096))
    model = Decoder(vocab=1024, width=4096, pattern=(layer,), periods=16, compute="bfloat16")
    return Serving(model=model, rows=1, prompt=slots - 4096, answer=4096, chunk=chunk)


def moved(cache: Cache, slots: int, devices: list[jax.Device]) -> tuple[float, float, float]:
    """Bytes that a token moves, and of a layer: its codes, its state."""
    serving = served(cache, slots, chunk=256)
    step, states = program(serving, devices)
    size = lambda tree: sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree)) / serving.model.periods
    (state,) = states["layers"]
    held = getattr(state, "held", state)
    return step.cost_analysis()["bytes accessed"], size((held.k, held.v)), size(state)


def main(chips: list[str]) -> None:
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
