"""Speed of the GPU kernels beside cuDNN's attention: causal self-attention in bfloat16, all keys or a tenth of the tiles.

    python -m pallas_kernels.tile_attention.gpu_bench        needs a GPU; without one, one line and exit status 2

Figures are the shortest of the rounds, in which both forms take turns. TFLOP/s count visible pairs alone, 4 head sizes each
forward and 14 in both passes, so that work on hidden pairs lowers them. `difference`: of outputs and gradients, the largest
as a part of the largest value.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.target import platform
from pallas_kernels.tile_attention import op
from pallas_kernels.tile_attention.bench import Causal
from pallas_kernels.tile_attention.tokens import Tokens

LENGTHS = (4096, 16384, 65536)
HEADS, KEY_HEADS, WIDTH = 16, 16, 128
DENSITY = 0.1
ROUNDS, CALLS = 8, 4


@dataclasses.dataclass(frozen=True)
class Near:
    """The last `size` tokens of one document."""

    size: int

    def visible(self, q, k):
        return Causal().visible(q, k) & (q.index - k.index < self.size)

    def bounds(self, q, k):
        may, must = Causal().bounds(q, k)
        return may & (q.index_low - k.index_high < self.size), must & (q.index_high - k.index_low < self.size)


def near(length: int) -> Near:
    """The band that covers DENSITY of the square: w T - w^2 / 2 = DENSITY T^2."""
    return Near(round(length * (1 - (1 - 2 * DENSITY) ** 0.5)))


def pairs(length: int, size: int) -> int:
    """Visible pairs of a causal band of `size` tokens."""
    return size * length - size * (size - 1) // 2


def tiled(mask, q, k, v):
    B, T = q.shape[:2]
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    tokens = Tokens(index, index, jnp.ones_like(index), jnp.zeros_like(index))
    return op.attention(op.Tiled("gpu", mask, q.shape[-1] ** -0.5), q, k, v, tokens, tokens)[0].astype(q.dtype)


def cudnn(mask, q, k, v):
    window = (mask.size - 1, 0) if isinstance(mask, Near) else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation="cudnn")


def with_gradient(form: Callable) -> Callable:
    def run(mask, q, k, v, d_out):
        out, pull = jax.vjp(lambda *arrays: form(mask, *arrays), q, k, v)
        return out, *pull(d_out)

    return run


def inputs(length: int) -> tuple[Array, ...]:
    """q, k, v and the cotangent of the output."""
    heads = HEADS, KEY_HEADS, KEY_HEADS, HEADS
    keys = jax.random.split(jax.random.key(0), len(heads))
    return tuple(jax.random.normal(key, (1, length, n, WIDTH), jnp.bfloat16) for key, n in zip(keys, heads, strict=True))


def shortest(runs: dict[str, Callable], arrays: tuple[Array, ...]) -> dict[str, float]:
    """Seconds of a call."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                out = run(*arrays)
            jax.block_until_ready(out)
            best[name] = min(best[name], (time.perf_counter() - start) / CALLS)
    return best


def difference(ours: list[Array], theirs: list[Array]) -> float:
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in wide)


def row(length: int, mask: Causal | Near, part: str) -> str:
    """One line of the table: `forward`, or `both` passes."""
    arrays = inputs(length) if part == "both" else inputs(length)[:3]
    forms = {name: with_gradient(form) if part == "both" else form for name, form in (("lcx", tiled), ("cudnn", cudnn))}
    runs = {
        name: jax.jit(lambda *arrays, form=form: form(mask, *arrays)).lower(*arrays).compile() for name, form in forms.items()
    }
    best, outs = shortest(runs, arrays), [jax.tree.leaves(run(*arrays)) for run in runs.values()]
    size = mask.size if isinstance(mask, Near) else length
    work = pairs(length, size) * HEADS * (14 if part == "both" else 4) * WIDTH / 1e12
    cells = [length, "causal" if size == length else f"window {size}", part]
    cells += [f"{seconds * 1e3:.2f} ms, {work / seconds:.0f} TFLOP/s" for seconds in best.values()]
    cells += [f"{best['cudnn'] / best['lcx']:.2f}", f"{difference(*outs):.1e}"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    if platform() != "gpu":
        print(f"gpu_bench: no GPU: this machine's default device is {jax.devices()[0].device_kind}", file=sys.stderr)
        return 2
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {HEADS} heads of {WIDTH}, bfloat16\n")
    print("| tokens | mask | part | lcx | cuDNN | cuDNN / lcx | difference |\n|---|---|---|---|---|---|---|")
    for length, part in itertools.product(LENGTHS, ("forward", "both")):
        for mask in (Causal(), near(length)):
            print(row(length, mask, part), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
