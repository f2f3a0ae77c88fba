"""Speed of the GPU kernels: self-attention in bfloat16 beside cuDNN's, and of their two forms beside each other.

    python -m pallas_kernels.tile_attention.gpu_bench          needs a GPU; without one, one line and exit status 2
    python -m pallas_kernels.tile_attention.gpu_bench forms    Hopper and Triton: head sizes, few queries over many keys

Figures are the shortest of the rounds, in which all forms take turns. TFLOP/s count visible pairs alone, 4 head sizes each
forward and 14 in both passes, so that work on hidden pairs lowers them. `difference`: of outputs and gradients, the largest
as a part of the largest value. `all / it`: the time of attention over all pairs divided by the row's, both lcx.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.target import platform
from pallas_kernels.tile_attention import gpu, hopper, op, triton
from pallas_kernels.tile_attention.bench import Causal
from pallas_kernels.tile_attention.tokens import Tokens

LENGTHS = (4096, 16384, 65536)
HEADS, KEY_HEADS, WIDTH = 16, 16, 128
DENSITY = 0.1
SECONDS = 1.0  # of a row, about


@dataclasses.dataclass(frozen=True)
class All:
    """Every token of a document sees every other."""

    def visible(self, q, k):
        return (q.segments == k.segments) & (q.segments > 0)

    def bounds(self, q, k):
        everything = q.index_low == q.index_low
        return everything & k.ordinary, everything & ~(q.padding | k.padding)


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


def pairs(length: int, mask: All | Causal | Near) -> int:
    """Visible pairs of a row of one document."""
    if isinstance(mask, All):
        return length * length
    size = mask.size if isinstance(mask, Near) else length
    return size * length - size * (size - 1) // 2


def tiled(mask, q, k, v):
    index = lambda x: jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    tokens = lambda index: Tokens(index, index, jnp.ones_like(index), jnp.zeros_like(index))
    fold = op.Tiled("gpu", mask, q.shape[-1] ** -0.5)
    return op.attention(fold, q, k, v, tokens(index(q)), tokens(index(k)))[0].astype(q.dtype)


def cudnn(mask, q, k, v):
    window = (mask.size - 1, 0) if isinstance(mask, Near) else None
    causal = not isinstance(mask, All)
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, local_window_size=window, implementation="cudnn")


def with_gradient(form: Callable) -> Callable:
    def run(mask, q, k, v, d_out):
        out, pull = jax.vjp(lambda *arrays: form(mask, *arrays), q, k, v)
        return out, *pull(d_out)

    return run


def inputs(length: int, keys: int, heads: int, key_heads: int, width: int) -> tuple[Array, ...]:
    """q, k, v and the cotangent of the output."""
    shapes = (length, heads), (keys, key_heads), (keys, key_heads), (length, heads)
    seeds = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(seed, (1, *shape, width), jnp.bfloat16) for seed, shape in zip(seeds, shapes, strict=True))


def shortest(runs: dict[str, Callable], arrays: tuple[Array, ...]) -> dict[str, float]:
    """Seconds of a call."""
    best, start = dict.fromkeys(runs, float("inf")), time.perf_counter()
    for run in runs.values():
        jax.block_until_ready(run(*arrays))
    calls = 1 + int(0.02 * len(runs) / (time.perf_counter() - start))
    while time.perf_counter() - start < SECONDS:
        for name, run in runs.items():
            begin = time.perf_counter()
            for _ in range(calls):
                out = run(*arrays)
            jax.block_until_ready(out)
            best[name] = min(best[name], (time.perf_counter() - begin) / calls)
    return best


def difference(ours: list[Array], theirs: list[Array]) -> float:
    wide = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(ours, theirs, strict=True)]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in wide)


def compiled(forms: dict[str, Callable], mask, part: str, arrays: tuple[Array, ...]) -> dict[str, Callable]:
    """`forward`, or `both` passes, of each form."""
    wrap = with_gradient if part == "both" else lambda form: form
    return {name: jax.jit(functools.partial(wrap(form), mask)).lower(*arrays).compile() for name, form in forms.items()}


def beside_cudnn() -> None:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {HEADS} heads of {WIDTH}, bfloat16\n")
    print("| tokens | mask | part | lcx | cuDNN | cuDNN / lcx | all / it | difference |\n|---|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        for part in ("forward", "both"):
            arrays = inputs(length, length, HEADS, KEY_HEADS, WIDTH)[: 4 if part == "both" else 3]
            for mask in (All(), Causal(), near(length)):
                runs = compiled({"lcx": tiled, "cudnn": cudnn}, mask, part, arrays)
                best = shortest(runs, arrays)
                whole = best["lcx"] if isinstance(mask, All) else whole
                work = pairs(length, mask) * HEADS * (14 if part == "both" else 4) * WIDTH / 1e12
                cells = [length, {All: "all", Causal: "causal"}.get(type(mask)) or f"window {mask.size}", part]
                cells += [f"{seconds * 1e3:.2f} ms, {work / seconds:.0f} TFLOP/s" for seconds in best.values()]
                cells += [f"{best['cudnn'] / best['lcx']:.2f}", f"{whole / best['lcx']:.2f}"]
                cells += [f"{difference(*(jax.tree.leaves(run(*arrays)) for run in runs.values())):.1e}"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def beside_each_other() -> None:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, causal, bfloat16\n")
    print("| queries | keys | heads | key heads | width | part | Hopper ms | Triton ms | as chosen ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    shapes = [(8192, 8192, 16, 16, 64), (8192, 8192, 16, 4, 128), (8192, 8192, 8, 4, 256)]
    shapes += [(few, 65536, 32, 8, 128) for few in (1, 16, 64, 256)]
    for shape in shapes:
        for part in ("forward", "both") if shape[0] == shape[1] else ("forward",):
            arrays = inputs(*shape)[: 4 if part == "both" else 3]
            best = {}
            for form in (hopper, triton, gpu):
                with_form = lambda mask, q, k, v, form=form: _alone(form, mask, q, k, v)
                best |= shortest(compiled({form.__name__: with_form}, All(), part, arrays), arrays)
            print(
                f"| {' | '.join(map(str, (*shape, part)))} | {' | '.join(f'{s * 1e3:.3f}' for s in best.values())} |",
                flush=True,
            )


def _alone(form, mask, q, k, v):
    """`tiled` in one form, wherever it would be chosen."""
    chosen, op.FORMS["gpu"] = op.FORMS["gpu"], form
    try:
        return tiled(mask, q, k, v)
    finally:
        op.FORMS["gpu"] = chosen


def main(arguments: list[str]) -> int:
    if platform() != "gpu":
        print(f"gpu_bench: no GPU: this machine's default device is {jax.devices()[0].device_kind}", file=sys.stderr)
        return 2
    beside_each_other() if arguments == ["forms"] else beside_cudnn()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
