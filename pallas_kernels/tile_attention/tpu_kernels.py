"""The three kernels of tile attention on a TPU: forward, gradient of the queries, gradients of keys and values.

FlashAttention-2 (2023). Rows are the R = G bq queries of a tile of tokens, stacked with the G heads of one key head. Scores are
in base 2, c = log2(e):
    s = c softcap(scale q k^T),   m' = max(m, max_k s),   p = 2^(s - m'),   l = l 2^(m - m') + sum_k p,   o = o 2^(m - m') + p v
    backward: p = 2^(s - c lse),  ds = p (dout v^T - delta) scale softcap',  dq += ds k,  dk += ds^T q,  dv += p^T dout
The kernel of dk and dv holds scores keys first, so that lse and delta are the rows that they come as; lse and delta
[1, R] become columns once an output where queries stay. Products are taken in the dtype of the inputs, HIGHEST if that is
float32, and summed in float32. With a bias, slope times the distance of the tokens is added to s; slopes come as lse does.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.tile_attention.blocks import Sizes, forward_bytes, key_gradient_bytes, query_gradient_bytes
from pallas_kernels.tile_attention.scores import LOG2E, LOW, Scores, dot, sees_nothing
from pallas_kernels.tile_attention.tokens import Tokens
from pallas_kernels.tile_attention.tpu_sweep import Kernel
from pallas_kernels.tpu_chips import LANES


def forward(scores: Scores, size: Sizes, dtype: Any) -> Kernel:
    """Majors q, tokens; minors k, v, tokens; outputs out [R, E] and lse [1, R]. A bias's slopes [1, R] follow q."""
    R = size.G * size.bq

    def start(refs):
        refs.top[...] = jnp.full_like(refs.top, LOW)
        refs.total[...] = jnp.zeros_like(refs.total)
        refs.total_out[...] = jnp.zeros_like(refs.total_out)
        if size.biased:
            refs.slope_column[...] = _turned(refs.slope, R)

    def step(masked, refs):
        s, _ = scores.logits(dot(refs.q[...], refs.k[...], 1, 1))
        if masked or size.biased:
            tokens = _columns(refs.q_tokens[...]), _rows(refs.k_tokens[...])
            s = _finished(s, scores, size, masked, tokens, refs.slope_column[:, :1] if size.biased else None, axis=0)
        before = refs.top[...]
        peak = jnp.maximum(before, s.max(axis=1, keepdims=True))
        p = jnp.exp2(s - peak[:, :1])
        decay = jnp.exp2(before - peak)
        refs.top[...] = peak
        refs.total[...] = refs.total[...] * decay + p.sum(axis=1, keepdims=True)
        refs.total_out[...] = refs.total_out[...] * decay[:, :1] + dot(p.astype(refs.v.dtype), refs.v[...], 1, 0)

    def finish(refs):
        top, total = refs.top[...], refs.total[...]
        blind = sees_nothing(top, total)
        refs.out[...] = jnp.where(sees_nothing(top[:, :1], total[:, :1]), 0, refs.total_out[...] / total[:, :1])
        refs.lse[...] = jnp.where(blind, -jnp.inf, (top + jnp.log2(total)) / LOG2E).T[:1]

    return Kernel(
        ("q", *_if(size, "slope"), "q_tokens", *KEYS, "out", "lse", "top", "total", "total_out", *_if(size, "slope_column")),
        start,
        step,
        finish,
        ((R, size.E), (1, R)),
        ((R, LANES), (R, LANES), (R, size.E), *_if(size, (R, LANES))),
        2 * (size.D + size.E),
        forward_bytes(size, dtype),
    )


def query_gradient(scores: Scores, size: Sizes, dtype: Any) -> Kernel:
    """Majors q, d_out, lse, delta, tokens; minors k, v, tokens; output dq [R, D]. lse in base 2. Slopes follow delta."""
    R = size.G * size.bq

    def start(refs):
        refs.lse_column[...] = _turned(refs.lse, R)
        refs.delta_column[...] = _turned(refs.delta, R)
        refs.total[...] = jnp.zeros_like(refs.total)
        if size.biased:
            refs.slope_column[...] = _turned(refs.slope, R)

    def step(masked, refs):
        s, steepness = scores.logits(dot(refs.q[...], refs.k[...], 1, 1))
        if masked or size.biased:
            tokens = _columns(refs.q_tokens[...]), _rows(refs.k_tokens[...])
            s = _finished(s, scores, size, masked, tokens, refs.slope_column[:, :1] if size.biased else None, axis=0)
        p = jnp.exp2(s - refs.lse_column[:, :1])
        ds = p * (dot(refs.d_out[...], refs.v[...], 1, 1) - refs.delta_column[:, :1]) * steepness
        refs.total[...] += dot(ds.astype(refs.k.dtype), refs.k[...], 1, 0)

    def finish(refs):
        refs.dq[...] = refs.total[...] * scores.scale

    return Kernel(
        (*_queries(size), *KEYS, "dq", "lse_column", "delta_column", "total", *_if(size, "slope_column")),
        start,
        step,
        finish,
        ((R, size.D),),
        ((R, LANES), (R, LANES), (R, size.D), *_if(size, (R, LANES))),
        2 * (2 * size.D + size.E),
        query_gradient_bytes(size, dtype),
    )


def key_gradient(scores: Scores, size: Sizes, dtype: Any) -> Kernel:
    """Majors k, v, tokens; minors q, d_out, lse, delta, tokens; outputs dk [bk, D] and dv [bk, E]. lse in base 2."""
    outputs = ((size.bk, size.D), (size.bk, size.E))

    def start(refs):
        refs.total_dk[...] = jnp.zeros_like(refs.total_dk)
        refs.total_dv[...] = jnp.zeros_like(refs.total_dv)

    def step(masked, refs):
        s, steepness = scores.logits(dot(refs.k[...], refs.q[...], 1, 1))
        if masked or size.biased:
            tokens = _rows(refs.q_tokens[...]), _columns(refs.k_tokens[...])
            s = _finished(s, scores, size, masked, tokens, refs.slope[...] if size.biased else None, axis=1)
        p = jnp.exp2(s - refs.lse[...])
        ds = p * (dot(refs.v[...], refs.d_out[...], 1, 1) - refs.delta[...]) * steepness
        refs.total_dv[...] += dot(p.astype(refs.d_out.dtype), refs.d_out[...], 1, 0)
        refs.total_dk[...] += dot(ds.astype(refs.q.dtype), refs.q[...], 1, 0)

    def finish(refs):
        refs.dk[...] = refs.total_dk[...] * scores.scale
        refs.dv[...] = refs.total_dv[...]

    names = (*KEYS, *_queries(size), "dk", "dv", "total_dk", "total_dv")
    return Kernel(names, start, step, finish, outputs, outputs, 4 * (size.D + size.E), key_gradient_bytes(size, dtype))


KEYS = ("k", "v", "k_tokens")


def _queries(size: Sizes) -> tuple[str, ...]:
    return ("q", "d_out", "lse", "delta", *_if(size, "slope"), "q_tokens")


def _if(size: Sizes, what: Any) -> tuple[Any, ...]:
    return (what,) if size.biased else ()


def _finished(
    s: Float[Array, "n m"], scores: Scores, size: Sizes, masked: bool, tokens: tuple[Tokens, Tokens], slope: Any, axis: int
) -> Float[Array, "n m"]:
    """Scores with their bias, hidden where a tile is masked; queries of all heads along `axis`."""
    if slope is not None:
        s = s + _stacked(scores.bias(*tokens), size.G, axis) * slope
    return _hide(s, scores.mask.visible(*tokens), size.G, axis) if masked else s


def _turned(row, R: int) -> Float[Array, "R lanes"]:
    """A row [1, R] as a column, in every lane."""
    return jnp.broadcast_to(row[...], (LANES, R)).T


def _rows(tokens: Int[Array, "4 n"]) -> Tokens:
    return Tokens(*(tokens[field : field + 1] for field in range(4)))


def _columns(tokens: Int[Array, "4 n"]) -> Tokens:
    """[n, 1] fields. A full tile is transposed: a single row does not turn into a column."""
    return Tokens(*(jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1] for row in _rows(tokens)))


def _hide(s: Float[Array, "n m"], seen: Bool[Array, "..."], G: int, axis: int) -> Float[Array, "n m"]:
    """LOW where a pair is not seen, for all heads along `axis`."""
    return jnp.where(_stacked(seen.astype(jnp.int32), G, axis) != 0, s, LOW)


def _stacked(x: Shaped[Array, "n m"], G: int, axis: int) -> Shaped[Array, "rows columns"]:
    """The same for all heads along `axis`."""
    return jnp.concatenate([x] * G, axis=axis)
