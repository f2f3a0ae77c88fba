"""Errors of attention against float64, by length, dtype and form: tables of docs/numerics.md.

    python -m lcx.attention.numerics             the form of CPUs, keys whole and in parts that are merged
    python -m lcx.attention.numerics kernels     the kernels of TPUs and GPUs, interpreted

The last 16 queries of a row attend to all its keys, causal, 4 heads of 64 over 2 key heads; logits have standard deviation 2,
every 1,000th key is one that all queries look for. Gradients are those of a normal cotangent of out. An error is the largest of
an array over its largest entry. bfloat16 inputs are compared with float64 attention of the same rounded inputs.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcx.attention.mask import Causal, tokens_of
from lcx.attention.merge import merge
from lcx.batch import TokenInfo
from pallas_kernels.tile_attention import op, tpu, triton

LENGTHS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
QUERIES, HEADS, KV_HEADS, HEAD_DIM = 16, 4, 2, 64
SCALE = 2.0 / HEAD_DIM**0.5
KERNELS = {"TPU": tpu, "Triton": triton}
PARTS = (1, 8, 32)  # of the keys, attended to apart and merged: what a ring of as many devices does


def row(length: int) -> tuple[np.ndarray, ...]:
    """q, k, v and the cotangent of out."""
    rng = np.random.default_rng(length)
    q = rng.normal(size=(QUERIES, HEADS, HEAD_DIM))
    k, v = (rng.normal(size=(length, KV_HEADS, HEAD_DIM)) for _ in range(2))
    k[::1000] += q.mean(axis=(0, 1))
    return q, k, v, rng.normal(size=q.shape)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, d_out: np.ndarray) -> dict[str, np.ndarray]:
    """In float64."""
    (n, H, _), (S, K, _) = q.shape, v.shape
    found = {"out": np.zeros(q.shape), "lse": np.zeros((n, H)), "dq": np.zeros(q.shape)}
    found |= {"dk": np.zeros(k.shape), "dv": np.zeros(v.shape)}
    for h in range(H):
        head = h // (H // K)
        scores = q[:, h] @ k[:, head].T * SCALE
        scores[np.arange(S)[None] > np.arange(S - n, S)[:, None]] = -np.inf
        peak = scores.max(axis=1, keepdims=True)
        p = np.exp(scores - peak)
        total = p.sum(axis=1, keepdims=True)
        p /= total
        found["out"][:, h], found["lse"][:, h] = p @ v[:, head], (peak + np.log(total))[:, 0]
        found["dv"][:, head] += p.T @ d_out[:, h]
        delta = (d_out[:, h] * found["out"][:, h]).sum(axis=1, keepdims=True)
        d_scores = p * (d_out[:, h] @ v[:, head].T - delta) * SCALE
        found["dq"][:, h] = d_scores @ k[:, head]
        found["dk"][:, head] += d_scores.T @ q[:, h]
    return found


@dataclasses.dataclass(frozen=True)
class Split(op.Fold):
    """Attention to each part of the keys, merged; gradients of queries are added up in float32, as rings do."""

    parts: int
    inner: op.Fold = op.Tiled("xla", Causal(), SCALE)

    def forward(self, q, k, v, q_tokens, k_tokens):
        def add(found, part):
            return merge(found, self.inner.forward(q, *part[:2], q_tokens, part[2])), None

        nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf)
        return jax.lax.scan(add, nothing, self._cut(k, v, k_tokens))[0]

    def backward(self, q, k, v, q_tokens, k_tokens, *given):
        def add(total, part):
            dq, *theirs = self.inner.backward(q, *part[:2], q_tokens, part[2], *given)
            return total + dq, theirs

        dq, theirs = jax.lax.scan(add, jnp.zeros(q.shape, jnp.float32), self._cut(k, v, k_tokens))
        return dq, *(jnp.moveaxis(x, 0, 1).reshape(y.shape) for x, y in zip(theirs, (k, v), strict=True))

    def _cut(self, *arrays):
        """[B, S, ...] -> [parts, B, S / parts, ...]."""
        return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], self.parts, -1, *x.shape[2:]), 1, 0), arrays)


@dataclasses.dataclass(frozen=True)
class Interpreted(op.Fold):
    """A kernel as it would run on its platform."""

    kernel: str

    def forward(self, *given):
        return KERNELS[self.kernel].forward(*given, mask=Causal(), scale=SCALE, interpret=True)

    def backward(self, *given):
        return KERNELS[self.kernel].backward(*given, mask=Causal(), scale=SCALE, interpret=True)


@functools.partial(jax.jit, static_argnums=6)
def measured(q, k, v, d_out, q_info, k_info, fold: op.Fold) -> dict[str, Array]:
    """out, lse and gradients of a row."""
    attention = lambda q, k, v: op.attention(fold, q, k, v, tokens_of(q_info), tokens_of(k_info))
    (out, lse), pull = jax.vjp(attention, q, k, v)
    dq, dk, dv = pull((d_out.astype(out.dtype), jnp.zeros_like(lse)))
    return {"out": out[0], "lse": lse[0], "dq": dq[0], "dk": dk[0], "dv": dv[0]}


def infos(length: int) -> tuple[TokenInfo, TokenInfo]:
    index = jnp.arange(length, dtype=jnp.int32)[None]
    keys = TokenInfo(index=index, order=index, positions=index[..., None].astype(jnp.float32), segments=jnp.ones_like(index))
    return keys.take(slice(length - QUERIES, length)), keys


def attention_table(title: str, folds: Mapping[str, op.Fold], lengths: Sequence[int]) -> None:
    names = ("out", "lse", "dq", "dk", "dv")
    print(f"| tokens | dtype | {title} | {' | '.join(names)} |\n|{'---|' * 8}")
    for length in lengths:
        for dtype in ("float32", "bfloat16"):
            given = [jnp.asarray(x, dtype)[None] for x in row(length)]
            wanted = exact(*(np.asarray(x[0], np.float64) for x in given))
            for name, fold in folds.items():
                got = jax.device_get(measured(*given, *infos(length), fold))
                errors = (np.abs(got[name] - wanted[name]).max() / np.abs(wanted[name]).max() for name in names)
                print(f"| {length:,} | {dtype} | {name} | {' | '.join(f'{error:.1e}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["kernels"]):
        sys.exit(__doc__)
    jax.config.update("jax_platforms", "cpu")
    if sys.argv[1:]:
        attention_table("kernel", {name: Interpreted(name) for name in KERNELS}, LENGTHS[:2])
    else:
        attention_table("parts merged", {str(parts): Split(parts) for parts in PARTS}, LENGTHS)
