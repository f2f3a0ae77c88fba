"""Bytes that writing to a cache moves, as the TPU compiler has it: needs no TPU, but the `tpu` extra.

    python -m lcx.bench_writing encode v5e v5p v6e
    python -m lcx.bench_writing gather v5e v5p v6e
    python -m lcx.bench_writing prefill v5p

encode: 65,536 tokens of 8 key heads on one chip, a token and head, by the kernel and as XLA codes (all but the packing), beside
what is needed: tokens in bfloat16 read once and codes written once. gather: a quarter of as many tokens fetched, a token that
stays and head, by the kernel and by XLA, beside all read once and a quarter written once. Of kernels the compiler is told what
they move: all arrays once. prefill: what a chunk of 512 of the model of `bench_serving` needs beside parameters and states.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lcx.bench_serving import CACHES, CHIPS, served
from lcx.cache.codecs.groups import IntGroups
from lcx.cache.codecs.plain import Plain
from lcx.cache.kv_cache import KVCache
from lcx.cache.policies.chelsea import Chelsea
from lcx.cache.policies.evict import Evict
from lcx.cache.policies.fold import Fold
from lcx.cache.scorers.critical import Critical
from lcx.cache.scorers.expected_attention import ExpectedAttention
from lcx.cache.scorers.snapkv import SnapKV
from lcx.parallel.topology import topology_devices
from lcx.serving_plan import program
from pallas_kernels.token_gather import op

TOKENS, HEADS, SIZE = 1 << 16, 8, 128
PROMPT = 131072
POLICIES = {
    "all tokens": KVCache(),
    "SnapKV": KVCache(policy=Evict(score=SnapKV(), keep=0.2)),
    "expected attention": KVCache(policy=Evict(score=ExpectedAttention(), keep=0.2)),
    "SnapKV, int4 groups": KVCache(codec=IntGroups(), policy=Evict(score=SnapKV(), keep=0.2)),
    "Chelsea": KVCache(policy=Chelsea(keep=0.2)),
    "SnapKV, folded": KVCache(policy=Fold(score=SnapKV(), keep=0.2)),
    "SnapKV, CriticalKV": KVCache(policy=Evict(score=Critical(of=SnapKV()), keep=0.2)),
}


def moved(run: Callable[..., Any], device: jax.Device, *given: tuple[tuple[int, ...], Any]) -> tuple[float, int]:
    """Bytes that a program moves of arrays of these shapes and types, and those of what it gives."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)) for shape, dtype in given]
    with jax.set_mesh(Mesh([device], ("one",))):
        made = jax.jit(run).lower(*arrays).compile()
    return made.cost_analysis()["bytes accessed"], sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.out_info))


def encoding(chip: str) -> Iterator[tuple[Any, ...]]:
    for name, cache in CACHES.items():
        if not isinstance(cache, KVCache) or cache.codec == Plain():
            continue
        tables = jax.tree.map(lambda x: x[None], cache.codec.tables(0, HEADS, SIZE, SIZE))
        kernel = lambda coder, x, known: coder.encode(x, known)
        plainly = lambda coder, x, known: coder.tightened(coder.loose(x, known), known)
        both = []
        for code in (kernel, plainly):
            run = lambda *x, code=code, sides=(cache.coders, tables): [
                code(*side) for side in zip(sides[0], x, sides[1], strict=True)
            ]
            count, codes = moved(run, *topology_devices(CHIPS[chip]), *[((1, HEADS, TOKENS, SIZE), jnp.bfloat16)] * 2)
            both.append(count / (TOKENS * HEADS))
        yield name, *both, codes / (TOKENS * HEADS) + 4 * SIZE


def fetching(chip: str) -> Iterator[tuple[Any, ...]]:
    stays = TOKENS // 4
    for dtype in (jnp.bfloat16, jnp.int8, jnp.float32):
        given = ((1, HEADS, TOKENS, SIZE), dtype), ((1, HEADS, stays), jnp.int32)
        kernel = lambda x, index: op.gathered(x, index, growing=True)
        both = [moved(run, *topology_devices(CHIPS[chip]), *given)[0] / (stays * HEADS) for run in (kernel, op.plainly)]
        yield jnp.dtype(dtype).name, *both, 5 * SIZE * jnp.dtype(dtype).itemsize + 4


def prefilling(chip: str) -> Iterator[tuple[Any, ...]]:
    for name, cache in POLICIES.items():
        step, states = program(served(cache, PROMPT, chunk=512), topology_devices(CHIPS[chip]), answers=False)
        held = jax.tree.leaves((states["layers"][0].held.k, states["layers"][0].held.v))
        layer = sum(x.size * x.dtype.itemsize for x in held) / len(held[0])
        yield name, step.memory_analysis().temp_size_in_bytes / 1e6, layer / 1e6


MODES = {
    "encode": (encoding, "| chip | cache | moved | by XLA | needed |"),
    "gather": (fetching, "| chip | of | moved | by XLA | needed |"),
    "prefill": (prefilling, "| chip | cache | MB of temporaries | MB of a layer's codes |"),
}


def main(arguments: list[str]) -> None:
    mode, *chips = arguments or [""]
    if mode not in MODES or not chips or not set(chips) <= set(CHIPS):
        sys.exit(__doc__)
    rows, head = MODES[mode]
    print(head + "\n|---|---" + "|---:" * (head.count("|") - 3) + "|")
    for chip in chips:
        for name, *numbers in rows(chip):
            print(f"| {chip} | {name} | {' | '.join(f'{n:.0f}' for n in numbers)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
