"""Errors of attention against float64, by length and dtype: a table of docs/numerics.md.

    python -m lcx.attention.numerics

The last 16 queries of a row attend to all its keys, causal, 4 heads of 64 over 2 key heads; logits have standard deviation 2,
every 1,000th key is one that all queries look for. An error is the largest of out (or of lse, or of dv) over its largest entry.
bfloat16 inputs are compared with float64 attention of the same rounded inputs.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.attend import attend
from lcx.attention.mask import Causal
from lcx.attention.merge import merge
from lcx.batch import TokenInfo

LENGTHS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
QUERIES, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 64
SCALE = 2.0 / HEAD_DIM**0.5
PARTS = (1, 8, 32)  # of the keys, attended to apart and merged: what a ring of as many devices does


def row(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(length)
    q = rng.normal(size=(QUERIES, HEADS, HEAD_DIM))
    k, v = (rng.normal(size=(length, KV_HEADS, HEAD_DIM)) for _ in range(2))
    k[::1000] += q.mean(axis=(0, 1))
    return q, k, v


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, lse, dv for a cotangent of ones) in float64."""
    (n, H, _), (S, K, E) = q.shape, v.shape
    out, lse, dv = np.zeros((n, H, E)), np.zeros((n, H)), np.zeros((S, K, E))
    for h in range(H):
        head = h // (H // K)
        scores = q[:, h] @ k[:, head].T * SCALE
        scores[np.arange(S)[None] > np.arange(S - n, S)[:, None]] = -np.inf
        peak = scores.max(axis=1, keepdims=True)
        p = np.exp(scores - peak)
        total = p.sum(axis=1, keepdims=True)
        out[:, h], lse[:, h] = p / total @ v[:, head], (peak + np.log(total))[:, 0]
        dv[:, head] += (p / total).sum(axis=0)[:, None]
    return out, lse, dv


def folded(q, k, v, q_info, k_info, parts: int):
    """Attention to each part of the keys, merged."""
    cuts = [slice(i * k.shape[1] // parts, (i + 1) * k.shape[1] // parts) for i in range(parts)]
    options = {"mask": Causal(), "scale": SCALE}
    attended = (attend(q, k[:, cut], v[:, cut], q_info, k_info.take(cut), **options) for cut in cuts)
    return functools.reduce(merge, attended)


@functools.partial(jax.jit, static_argnums=5)
def measured(q, k, v, q_info, k_info, parts):
    (out, lse), pull = jax.vjp(lambda v: folded(q, k, v, q_info, k_info, parts), v)
    return out[0], lse[0], pull((jnp.ones_like(out), jnp.zeros_like(lse)))[0][0]


def infos(length: int) -> tuple[TokenInfo, TokenInfo]:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    keys = TokenInfo(index=index, order=index, positions=index[..., None].astype(jnp.float32), segments=jnp.ones_like(index))
    return keys.take(slice(length - QUERIES, length)), keys


def attention_table() -> None:
    print("| tokens | dtype | parts merged | out | lse | dv |\n|---|---|---|---|---|---|")
    for length in LENGTHS:
        for dtype in ("float32", "bfloat16"):
            given = [jnp.asarray(x, dtype)[None] for x in row(length)]
            wanted = exact(*(np.asarray(x[0], np.float64) for x in given))
            for parts in PARTS:
                got = measured(*given, *infos(length), parts)
                errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(jax.device_get(got), wanted, strict=True)]
                cells = " | ".join(f"{error:.1e}" for error in errors)
                print(f"| {length:,} | {dtype} | {parts} | {cells} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(__doc__)
    jax.config.update("jax_platforms", "cpu")
    attention_table()
