"""The three kernels of tile attention on a TPU: forward, gradient of the queries, gradients of keys and values.

FlashAttention-2 (2023). Rows are the R = G bq queries of a tile of tokens, stacked with the G heads of one key head. Scores are
in base 2, c = log2(e):
    s = c softcap(scale q k^T),   m' = max(m, max_k s),   p = 2^(s - m'),   l = l 2^(m - m') + sum_k p,   o = o 2^(m - m') + p v
    backward: p = 2^(s - c lse),  ds = p (dout v^T - delta) scale softcap',  dq += ds k,  dk += ds^T q,  dv += p^T dout
The kernel of dk and dv holds scores keys first, so that lse and delta are the rows that they come as; lse and delta
[1, R] become columns once an output where queries stay. Products are taken in the dtype of the inputs, HIGHEST if that is
float32, and summed in float32.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.tile_attention.blocks import LANES, Sizes, forward_bytes, key_gradient_bytes, query_gradient_bytes
from pallas_kernels.tile_attention.scores import LOG2E, LOW, Scores, dot
from pallas_kernels.tile_attention.tokens import Tokens
from pallas_kernels.tile_attention.tpu_sweep import Kernel


def forward(scores: Scores, size: Sizes, dtype: Any) -> Kernel:
    """Majors q, tokens; minors k, v, tokens; outputs out [R, E] and lse [1, R]."""
    R = size.G * size.bq

    def start(q, q_tokens, k, v, k_tokens, out, lse, top, total, total_out):
        top[...] = jnp.full_like(top, LOW)
        total[...] = jnp.zeros_like(total)
        total_out[...] = jnp.zeros_like(total_out)

    def step(masked, q, q_tokens, k, v, k_tokens, out, lse, top, total, total_out):
        s = scores.logits(dot(q[...], k[...], 1, 1))[0]
        if masked:
            s = _hide(s, scores.mask.visible(_columns(q_tokens[...]), _rows(k_tokens[...])), size.G, axis=0)
        before = top[...]
        peak = jnp.maximum(before, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - peak[:, :1])
        decay = jnp.exp2(before - peak)
        top[...] = peak
        total[...] = total[...] * decay + p.sum(axis=1, keepdims=True)
        total_out[...] = total_out[...] * decay[:, :1] + dot(p.astype(v.dtype), v[...], 1, 0)

    def finish(q, q_tokens, k, v, k_tokens, out, lse, top, total, total_out):
        out[...] = jnp.where(top[:, :1] > LOW / 2, total_out[...] / total[:, :1], 0)
        lse[...] = jnp.where(top[...] > LOW / 2, (top[...] + jnp.log2(total[...])) / LOG2E, -jnp.inf).T[:1]

    return Kernel(
        start,
        step,
        finish,
        ((R, size.E), (1, R)),
        ((R, LANES), (R, LANES), (R, size.E)),
        2 * (size.D + size.E),
        forward_bytes(size, dtype),
    )


def query_gradient(scores: Scores, size: Sizes, dtype: Any) -> Kernel:
    """Majors q, d_out, lse, delta, tokens; minors k, v, tokens; output dq [R, D]. lse in base 2."""
    R = size.G * size.bq

    def start(q, d_out, lse, delta, q_tokens, k, v, k_tokens, dq, lse_column, delta_column, total):
        lse_column[...] = jnp.broadcast_to(lse[...], (LANES, R)).T
        delta_column[...] = jnp.broadcast_to(delta[...], (LANES, R)).T
        total[...] = jnp.zeros_like(total)

    def step(masked, q, d_out, lse, delta, q_tokens, k, v, k_tokens, dq, lse_column, delta_column, total):
        s, slope = scores.logits(dot(q[...], k[...], 1, 1))
        if masked:
            s = _hide(s, scores.mask.visible(_columns(q_tokens[...]), _rows(k_tokens[...])), size.G, axis=0)
        p = jnp.exp2(s - lse_column[:, :1])
        ds = p * (dot(d_out[...], v[...], 1, 1) - delta_column[:, :1]) * slope
        total[...] += dot(ds.astype(k.dtype), k[...], 1, 0)

    def finish(q, d_out, lse, delta, q_tokens, k, v, k_tokens, dq, lse_column, delta_column, total):
        dq[...] = total[...] * scores.scale

    return Kernel(
        start,
        step,
        finish,
        ((R, size.D),),
        ((R, LANES), (R, LANES), (R, size.D)),
        2 * (2 * size.D + size.E),
        query_gradient_bytes(size, dtype),
    )


def key_gradient(scores: Scores, size: Sizes, dtype: Any) -> Kernel:
    """Majors k, v, tokens; minors q, d_out, lse, delta, tokens; outputs dk [bk, D] and dv [bk, E]. lse in base 2."""
    outputs = ((size.bk, size.D), (size.bk, size.E))

    def start(k, v, k_tokens, q, d_out, lse, delta, q_tokens, dk, dv, total_dk, total_dv):
        total_dk[...] = jnp.zeros_like(total_dk)
        total_dv[...] = jnp.zeros_like(total_dv)

    def step(masked, k, v, k_tokens, q, d_out, lse, delta, q_tokens, dk, dv, total_dk, total_dv):
        s, slope = scores.logits(dot(k[...], q[...], 1, 1))
        if masked:
            s = _hide(s, scores.mask.visible(_rows(q_tokens[...]), _columns(k_tokens[...])), size.G, axis=1)
        p = jnp.exp2(s - lse[...])
        ds = p * (dot(v[...], d_out[...], 1, 1) - delta[...]) * slope
        total_dv[...] += dot(p.astype(d_out.dtype), d_out[...], 1, 0)
        total_dk[...] += dot(ds.astype(q.dtype), q[...], 1, 0)

    def finish(k, v, k_tokens, q, d_out, lse, delta, q_tokens, dk, dv, total_dk, total_dv):
        dk[...] = total_dk[...] * scores.scale
        dv[...] = total_dv[...]

    return Kernel(start, step, finish, outputs, outputs, 4 * (size.D + size.E), key_gradient_bytes(size, dtype))


def _rows(tokens: Int[Array, "4 n"]) -> Tokens:
    return Tokens(*(tokens[field : field + 1] for field in range(4)))


def _columns(tokens: Int[Array, "4 n"]) -> Tokens:
    """[n, 1] fields. A full tile is transposed: a single row does not turn into a column."""
    return Tokens(*(jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1] for row in _rows(tokens)))


def _hide(s: Float[Array, "n m"], seen: Bool[Array, "..."], G: int, axis: int) -> Float[Array, "n m"]:
    """LOW where a pair is not seen, for all heads along `axis`."""
    seen = jnp.concatenate([seen.astype(jnp.int32)] * G, axis=axis)
    return jnp.where(seen != 0, s, LOW)
