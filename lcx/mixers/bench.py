"""A training step of Titans' neural memory beside titans-pytorch, the same shapes, on this machine's CPU.

    python -m lcx.mixers.bench              all shapes, both sides in turn, medians and ratios as a Markdown table
    python -m lcx.mixers.bench lcx 0        one side of one shape, a line of JSON (what the above runs in fresh processes)
    python -m lcx.mixers.bench cost         cost a token and bytes of state at 1k to 64k tokens

Both: float32, one layer of width 384, four heads of 64, a memory of two matrices 64 x 256 with momentum and forgetting,
gradients taken every 128 tokens; a step is the output's gradient by all weights and the input. The peer has one forgetting and
momentum for `pooled` tokens, as its training script has for four; lcx has those of every token, and bounds its steps, which the
peer does not. No convolutions, which the peer lacks.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from lcx.side_by_side import in_turn, timed

WIDTH, HEADS, DIM, CHUNK = 384, 4, 64, 128
SIDES = ("lcx", "titans-pytorch")


@dataclasses.dataclass(frozen=True)
class Shape:
    """pooled: tokens that share the peer's gates."""

    rows: int
    length: int
    pooled: int


SHAPES = (Shape(1, 2048, 4), Shape(1, 8192, 4), Shape(1, 2048, 128), Shape(1, 8192, 128))


def lcx_step(shape: Shape) -> Callable[[], float]:
    """One step that returns its loss, of this project."""
    import jax

    layer, batch = _layer(shape.rows, shape.length)

    @jax.jit
    def step(layer, x):
        return jax.value_and_grad(lambda layer, x: (layer(x, batch)[0] ** 2).mean(), argnums=(0, 1))(layer, x)

    x = _rows(shape)
    return lambda: float(jax.block_until_ready(step(layer, x))[0])


def _layer(rows: int, length: int):
    import jax.numpy as jnp
    from flax import nnx

    from lcx.batch import Batch, causal_info
    from lcx.mixers.mixer import Inherited
    from lcx.mixers.neural_memory import NeuralMemory
    from lcx.parallel.rules import Rules

    spec = NeuralMemory(heads=HEADS, head_dim=DIM, chunk=CHUNK, taps=0, step=0.1)
    layer = spec.build(Inherited(width=WIDTH, depth=1, rope=None, compute="float32", rules=Rules()), rngs=nnx.Rngs(0))
    segments = jnp.ones((rows, length), jnp.int32)
    return layer, Batch(tokens=segments, info=causal_info(segments))


def peer_memory(width: int, heads: int, dim: int, depth: int, *, expand: float, pooled: int, chunk: int, step: float):
    """The layer of titans-pytorch, which imports much more than its memory."""
    import importlib.util
    import types

    import torch

    torch.set_num_threads(2)
    package = types.ModuleType("titans_pytorch")
    package.__path__ = list(importlib.util.find_spec("titans_pytorch").submodule_search_locations)
    sys.modules["titans_pytorch"] = package
    from titans_pytorch.memory_models import MemoryMLP
    from titans_pytorch.neural_memory import NeuralMemory

    model = MemoryMLP(dim, depth=depth, expansion_factor=expand)
    options = {"dim_head": dim, "heads": heads, "model": model, "chunk_size": pooled, "batch_size": chunk}
    return NeuralMemory(width, momentum=True, qk_rmsnorm=True, default_step_transform_max_lr=step, **options)


def peer_step(shape: Shape) -> Callable[[], float]:
    """The same of titans-pytorch."""
    import torch

    layer = peer_memory(WIDTH, HEADS, DIM, 2, expand=4.0, pooled=shape.pooled, chunk=CHUNK, step=0.1)
    x = torch.from_numpy(_rows(shape)).requires_grad_()

    def once() -> float:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        loss = (layer(x)[0] ** 2).mean()
        loss.backward()
        return float(loss.detach())

    return once


def compare() -> str:
    """The table: both sides of every shape in fresh processes, in turn, medians over all rounds."""
    lines = [
        "| tokens | peer's gates | lcx, ms | titans-pytorch, ms | ratio | peak beyond imports, MB (lcx, peer) | ratio |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for number, shape in enumerate(SHAPES):
        runs = in_turn("lcx.mixers.bench", SIDES, number)
        ms = [1e3 * statistics.median(s for run in runs[side] for s in run["seconds"]) for side in SIDES]
        peak = [statistics.median(run["peak"] - run["base"] for run in runs[side]) / 1e6 for side in SIDES]
        lines.append(
            f"| {shape.length:,} | of {shape.pooled} tokens | {ms[0]:,.0f} | {ms[1]:,.0f} | {ms[1] / ms[0]:.1f} "
            f"| {peak[0]:,.0f}, {peak[1]:,.0f} | {peak[0] / peak[1]:.2f} |"
        )
    return "\n".join(lines)


def cost() -> str:
    """Microseconds a token, forward, and bytes of state a row, by length."""
    import jax

    lines = ["| tokens | microseconds a token | bytes of state |", "| ---: | ---: | ---: |"]
    for length in (1024, 4096, 16384, 65536):
        layer, batch = _layer(1, length)
        forward, x = jax.jit(lambda layer, x, batch=batch: layer(x, batch)[0]), _rows(Shape(1, length, 1))
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(forward(layer, x))
            seconds.append(time.perf_counter() - start)
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(layer.init_state(1, length)))
        lines.append(f"| {length:,} | {1e6 * min(seconds[1:]) / length:.1f} | {state:,} |")
    return "\n".join(lines)


def side(name: str, shape: Shape, begin: float) -> dict:
    """Runs one side in this process. base: its memory when its imports are done."""
    import resource

    if name == "lcx":
        import lcx.mixers.neural_memory  # noqa: F401
    else:
        import torch  # noqa: F401
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    once = lcx_step(shape) if name == "lcx" else peer_step(shape)
    return timed(once, begin, warm=1, steps=3) | {"base": base}


def _rows(shape: Shape) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(shape.rows, shape.length, WIDTH)).astype(np.float32)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(side(sys.argv[1], SHAPES[int(sys.argv[2])], time.perf_counter())))
    else:
        print(cost() if sys.argv[1:] == ["cost"] else compare())
