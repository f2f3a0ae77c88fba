"""Time of distance plans beside plain attention with RoPE: forward and backward at 16,384 tokens, float32, causal.

    python -m lcx.positions.bench

Forms take turns in one process; the figures are the shortest of the rounds, ratios are to the first row. The rotation is part
of every form. A distance plan is a fold of the tile form a region: what it costs beyond plain attention are the tiles on the
borders of regions, which are computed in both, and the rotations of its regions. LongHeads sees a part of the keys; its chunks
are compared without a tile form.
"""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.batch import causal_info
from lcx.positions.dimension_groups import DimensionGroups
from lcx.positions.distance_plan import DistancePlan, Distances
from lcx.positions.dual_chunk import DualChunk
from lcx.positions.long_heads import LongHeads
from lcx.positions.rerope import ReRoPE
from lcx.positions.rope import Rope
from lcx.positions.rotate import rotate
from lcx.positions.self_extend import SelfExtend

LENGTH, HEADS, KV_HEADS, HEAD_DIM, ROUNDS = 16_384, 4, 2, 64, 2
PLANS: dict[str, DistancePlan | None] = {
    "RoPE": None,
    "SelfExtend": SelfExtend(group=8, window=1024),
    "ReRoPE": ReRoPE(window=1024),
    "Leaky ReRoPE": ReRoPE(window=1024, leak=8.0),
    "dual chunk": DualChunk(chunk=3072, clip=4095),
    "LongHeads, 16 chunks of 256": LongHeads(),
    "DPE": DimensionGroups(groups=(2, 8, 2, 8, 32, 32, 32, 4), window=1024),
}


def form(plan: DistancePlan | None) -> Callable:
    """The gradients of attention by raw queries, keys and values."""
    options = {"mask": Causal(), "scale": HEAD_DIM**-0.5}

    def attention(q, k, v, info):
        if plan is not None:
            distances = Distances(plan, Rope(), HEAD_DIM, LENGTH)
            k = plan.held(q, k) if plan.reads_queries else k
            return attend(q, k, v, info, info, distances=distances, **options)[0]
        frequencies = Rope().frequencies(HEAD_DIM, LENGTH)
        turned = (rotate(x, info.positions, frequencies) for x in (q, k))
        return attend(*turned, v, info, info, **options)[0]

    def both(q, k, v, info):
        out, pull = jax.vjp(lambda *given: attention(*given, info), q, k, v)
        return pull(out)

    return both


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    q, k, v = (jax.random.normal(key, (1, LENGTH, heads, HEAD_DIM)) for key, heads in zip(keys, shapes, strict=True))
    info = causal_info(np.ones((1, LENGTH), np.int32))
    runs = {name: functools.partial(jax.jit(form(plan)), q, k, v, info) for name, plan in PLANS.items()}
    best = dict.fromkeys(runs, float("inf"))
    for n in range(ROUNDS + 1):  # the first to compile
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[name] = min(best[name], time.perf_counter() - start if n else best[name])
    print(f"| {LENGTH:,} tokens | seconds | ratio |\n| --- | ---: | ---: |")
    for name, took in best.items():
        print(f"| {name} | {took:.2f} | {took / best['RoPE']:.2f} |")


if __name__ == "__main__":
    main()
