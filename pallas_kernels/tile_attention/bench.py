"""Speed and memory of the tiled form beside dense attention, causal self-attention in float32 on this machine.

    python -m pallas_kernels.tile_attention.bench          against dense jnp and jax.nn.dot_product_attention
    python -m pallas_kernels.tile_attention.bench sizes    tile sizes and rows a step, beside those of `xla.choose_sizes`

All forms of a shape take turns in one process; the figures are the shortest of the rounds, the ratios are of those.
"""

import dataclasses
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.tile_attention import op, xla
from pallas_kernels.tile_attention.tokens import Tokens

SHAPES = ((8, 512, 4, 32), (2, 2048, 4, 32), (4, 512, 4, 64), (1, 4096, 4, 64))  # B, T, H, D
SIZES = ((64, 64), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))
SECONDS = 6.0  # a shape


@dataclasses.dataclass(frozen=True)
class Causal:
    """Causal attention in one document."""

    def visible(self, q, k):
        return (q.segments == k.segments) & (k.order <= q.order)

    def bounds(self, q, k):
        return k.order_low <= q.order_high, (k.order_high <= q.order_low) & ~(q.padding | k.padding)


def dense(q, k, v, tokens):
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    seen = Causal().visible(tokens.rows(), tokens.columns())[:, None]
    return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(jnp.where(seen, scores, -1e30)), v)


def library(q, k, v, tokens):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def tiled(q, k, v, tokens):
    return op.attention(op.Tiled("xla", Causal(), q.shape[-1] ** -0.5), q, k, v, tokens, tokens)[0]


def sized(q_size: int, k_size: int, rows: int) -> Callable:
    def form(q, k, v, tokens):
        fold = op.Tiled("xla", Causal(), q.shape[-1] ** -0.5, None, xla.Sizes(q_size, k_size, rows))
        return op.attention(fold, q, k, v, tokens, tokens)[0]

    return form


def measure(shape: tuple[int, int, int, int], forms: dict[str, Callable]) -> dict[str, tuple[float, float, float, float]]:
    """For each form: seconds forward, seconds forward and backward, seconds to compile the latter, its temporary bytes."""
    B, T = shape[:2]
    q, k, v, d_out = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 4))
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    tokens = Tokens(index, index, jnp.ones_like(index), jnp.zeros_like(index))
    runs = {}
    for name, form in forms.items():

        def both(q, k, v, d_out, tokens, form=form):
            out, pull = jax.vjp(lambda *a: form(*a, tokens), q, k, v)
            return out, pull(d_out)

        forward = jax.jit(form).lower(q, k, v, tokens).compile()
        start = time.perf_counter()
        backward = jax.jit(both).lower(q, k, v, d_out, tokens).compile()
        runs[name] = forward, backward, time.perf_counter() - start

    best = dict.fromkeys(runs, (float("inf"), float("inf")))
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for name, (forward, backward, _) in runs.items():
            times = _seconds(forward, q, k, v, tokens), _seconds(backward, q, k, v, d_out, tokens)
            best[name] = tuple(map(min, best[name], times))
    temporaries = {name: run[1].memory_analysis().temp_size_in_bytes for name, run in runs.items()}
    return {name: (*best[name], runs[name][2], temporaries[name]) for name in runs}


def _seconds(compiled: Callable, *arguments) -> float:
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start


def print_table(shape: tuple[int, int, int, int], forms: dict[str, Callable], first: str) -> None:
    rows = measure(shape, forms)
    for name, (forward, backward, compiled, temporaries) in rows.items():
        ratio = backward / rows[first][1]
        cells = (shape, name, f"{forward * 1e3:.1f}", f"{backward * 1e3:.1f}", f"{ratio:.2f}", f"{compiled:.1f}")
        print("|", " | ".join(map(str, (*cells, f"{temporaries / 1e6:.0f}"))), "|", flush=True)


def main(arguments: list[str]) -> None:
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}\n")
    print("| B, T, H, D | form | forward ms | forward + backward ms | ratio | compile s | temporaries MB |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        if arguments == ["sizes"]:
            chosen = xla.choose_sizes(shape, shape)
            all_rows = {(*size, rows) for size in SIZES if max(size) <= shape[1] for rows in {1, shape[0]}}
            forms = {"{} x {}, {} rows".format(*size): sized(*size) for size in (chosen, *sorted(all_rows - {chosen}))}
        else:
            forms = {"tiled": tiled, "dense jnp": dense, "jax.nn.dot_product_attention": library}
        print_table(shape, forms, next(iter(forms)))


if __name__ == "__main__":
    main(sys.argv[1:])
