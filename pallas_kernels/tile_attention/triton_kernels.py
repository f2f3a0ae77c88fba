"""The three kernels of tile attention on a GPU: forward, gradient of the queries, gradients of keys and values.

FlashAttention-2 (2023). A program keeps one tile of its outputs and goes over the tiles of its list, those that are fully
visible first, without a mask. Rows are the R = bq G queries of a tile of tokens, their G heads beside each other:
    s = c softcap(scale q k^T),   m' = max(m, max_k s),   p = 2^(s - m'),   l = l 2^(m - m') + sum_k p,   o = o 2^(m - m') + p v
    backward: p = 2^(s - c lse),  ds = p (dout v^T - delta) scale softcap',  dq += ds k,  dk += ds^T q,  dv += p^T dout
with c = log2(e). The kernel of dk and dv holds scores keys first and takes one query head at a time, all those of its key head
one after the other. References of one program, whose batch row and heads the grid has chosen:
    q, d_out, out, dq [bq, G, width], lse, delta [G, bq]; whole in that of dk and dv: [T, H/K, width], [H/K, T]
    k, v [S, width]; dk, dv [bk, width];  tokens [4, length];  minors [A], ends [3]: the list (`gpu_lists`)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.tile_attention.blocks import Sizes
from pallas_kernels.tile_attention.scores import LOG2E, LOW, Scores, dot, sees_nothing
from pallas_kernels.tile_attention.tokens import Tokens


def forward(scores: Scores, size: Sizes, minors, ends, refs) -> None:
    R = size.G * size.bq
    rows, q_tokens = refs.q[...].reshape(R, size.D), _stacked_tokens(refs.q_tokens, size).rows()
    slopes = None if scores.along is None else refs.slopes[...].T.reshape(R)[:, None]

    def step(masked, n, carry):
        total_out, top, total = carry
        keys = pl.ds(minors[ends[0] + n] * size.bk, size.bk)
        s, _ = scores.logits(dot(rows, refs.k[keys, :], 1, 1))
        s = _finished(s, scores, masked, slopes, q_tokens, lambda: _tokens(refs.k_tokens, keys).columns())
        peak = jnp.maximum(top, s.max(axis=1))
        p = jnp.exp2(s - peak[:, None])
        decay = jnp.exp2(top - peak)
        total_out = total_out * decay[:, None] + dot(p.astype(refs.v.dtype), refs.v[keys, :], 1, 0)
        return total_out, peak, total * decay + p.sum(axis=1)

    start = jnp.zeros((R, size.E), jnp.float32), jnp.full((R,), LOW, jnp.float32), jnp.zeros((R,), jnp.float32)
    total_out, top, total = _over_list(ends, step, start)
    blind = sees_nothing(top, total)
    total = jnp.where(blind, 1.0, total)
    refs.out[...] = jnp.where(blind[:, None], 0.0, total_out / total[:, None]).reshape(size.bq, size.G, size.E)
    refs.lse[...] = jnp.where(blind, -jnp.inf, (top + jnp.log2(total)) / LOG2E).reshape(size.bq, size.G).T


def query_gradient(scores: Scores, size: Sizes, minors, ends, refs) -> None:
    """lse in base 2."""
    R = size.G * size.bq
    rows, d_rows = refs.q[...].reshape(R, size.D), refs.d_out[...].reshape(R, size.E)
    row = lambda x: x[...].T.reshape(R)[:, None]
    lse, delta = row(refs.lse), row(refs.delta)
    slopes = None if scores.along is None else row(refs.slopes)
    q_tokens = _stacked_tokens(refs.q_tokens, size).rows()

    def step(masked, n, total):
        keys = pl.ds(minors[ends[0] + n] * size.bk, size.bk)
        k_tile = refs.k[keys, :]
        s, steepness = scores.logits(dot(rows, k_tile, 1, 1))
        s = _finished(s, scores, masked, slopes, q_tokens, lambda: _tokens(refs.k_tokens, keys).columns())
        ds = jnp.exp2(s - lse) * (dot(d_rows, refs.v[keys, :], 1, 1) - delta) * steepness
        return total + dot(ds.astype(k_tile.dtype), k_tile, 1, 0)

    total = _over_list(ends, step, jnp.zeros((R, size.D), jnp.float32))
    refs.dq[...] = (total * scores.scale).reshape(size.bq, size.G, size.D)


def key_gradient(scores: Scores, size: Sizes, minors, ends, refs) -> None:
    """lse in base 2."""
    heads = refs.q.shape[1]
    k, v, k_tokens = refs.k[...], refs.v[...], _tokens(refs.k_tokens, slice(None)).rows()

    def step(masked, n, carry):
        total_dk, total_dv = carry
        tile, head = jax.lax.div(n, jnp.int32(heads)), jax.lax.rem(n, jnp.int32(heads))
        queries = pl.ds(minors[ends[0] + tile] * size.bq, size.bq)
        q_tile, d_tile = refs.q[queries, head, :], refs.d_out[queries, head, :]
        s, steepness = scores.logits(dot(k, q_tile, 1, 1))
        slopes = None if scores.along is None else refs.slopes[head, queries][None, :]
        s = _finished(s, scores, masked, slopes, k_tokens, lambda: _tokens(refs.q_tokens, queries).columns(), queries_last=True)
        p = jnp.exp2(s - refs.lse[head, queries][None, :])
        ds = p * (dot(v, d_tile, 1, 1) - refs.delta[head, queries][None, :]) * steepness
        total_dv += dot(p.astype(d_tile.dtype), d_tile, 1, 0)
        return total_dk + dot(ds.astype(q_tile.dtype), q_tile, 1, 0), total_dv

    start = jnp.zeros((size.bk, size.D), jnp.float32), jnp.zeros((size.bk, size.E), jnp.float32)
    total_dk, total_dv = _over_list(ends, step, start, heads)
    refs.dk[...], refs.dv[...] = total_dk * scores.scale, total_dv


def _finished(s, scores: Scores, masked: bool, slopes, down: Tokens, across: Callable[[], Tokens], queries_last: bool = False):
    """Scores with their bias, hidden where the tile is masked. Tokens: those of the rows, and of the columns when needed."""
    if not masked and slopes is None:
        return s
    q, k = (across(), down) if queries_last else (down, across())
    s = s if slopes is None else s + scores.bias(q, k) * slopes
    return jnp.where(scores.mask.visible(q, k), s, LOW) if masked else s


def _over_list(ends, step: Callable[[bool, Any, Any], Any], carry: Any, times: int = 1) -> Any:
    """`carry = step(masked, n, carry)` along the list, `times` for each tile."""
    full, some = ends[1] * times, ends[2] * times
    carry = jax.lax.fori_loop(0, full, lambda n, carry: step(False, n, carry), carry)
    return jax.lax.fori_loop(full, some, lambda n, carry: step(True, n, carry), carry)


def _tokens(tokens, place) -> Tokens:
    return Tokens(*(tokens[field, place] for field in range(4)))


def _stacked_tokens(tokens, size: Sizes) -> Tokens:
    """Of the rows of a stack, token by token."""
    one = lambda field: jnp.broadcast_to(field[:, None], (size.bq, size.G)).reshape(size.G * size.bq)
    return Tokens(*map(one, _tokens(tokens, slice(None))))
