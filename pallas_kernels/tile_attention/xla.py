"""Attention in tiles, in plain XLA: memory linear in length, nothing computed for tiles that no pair can see.

FlashAttention-2 (2023), with scores held keys first, s[k, q], so that every statistic of a query is a row vector and every
product is a plain matrix product. Forward, for a query tile, over its key tiles, then out = o / l and lse = m + log l:
    m' = max(m, max_k s),   p = exp(s - m'),   l = l exp(m - m') + sum_k p,   o^T = o^T exp(m - m') + v^T p
Backward saves q, k, v, out, lse only; for a key tile, over its query tiles:
    p = exp(s - lse),   ds = p (v dout^T - delta),   dv += p dout,   dk += ds q,   dq^T += k^T ds
with delta = sum(dout out) - dlse.
Products are taken in the dtype of the inputs and summed in float32; the softmax is float32.
A row that sees nothing gives out = 0, lse = -inf and zero gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_attention.tiling import cut, cut_tokens, over_tiles, pick, states, tile_size, uncut, visible
from pallas_kernels.tile_attention.tokens import Mask, Tokens

LOW = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a pair that is not visible; -inf would give NaN


class Plan(NamedTuple):
    """What is static: the mask, the logits and the sizes of a tile."""

    mask: Mask
    scale: float
    softcap: float | None
    q_size: int
    k_size: int
    rows: int


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. Differentiable in q, k and v, with cotangents for both; tokens get no gradient."""
    return _attention(plan(q.shape, k.shape, mask, scale, softcap), q, k, v, q_tokens, k_tokens)


def plan(q_shape: tuple[int, ...], k_shape: tuple[int, ...], mask: Mask, scale: float, softcap: float | None) -> Plan:
    """Tile sizes: 256 x 256, longer key tiles for few queries; short rows share a tile list so that a step has enough work."""
    (B, T, H, _), S = q_shape, k_shape[1]
    q_size = tile_size(T, 256)
    k_size = tile_size(S, min(4096, max(256, 65536 // max(q_size, 1))))
    rows = next(n for n in range(1, B + 1) if B % n == 0 and (n == B or n * H * q_size * k_size >= 1 << 21))
    return Plan(mask, scale, softcap, q_size, k_size, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan, q, k, v, q_tokens, k_tokens):
    return _forward(plan, q, k, v, q_tokens, k_tokens)


def _save(plan, *inputs):
    # The barrier keeps a scan over layers from hoisting what depends on the tokens alone into residuals, tile by tile.
    inputs = jax.lax.optimization_barrier(inputs)
    out, lse = _forward(plan, *inputs)
    return (out, lse), (*inputs, out, lse)


def _forward(plan, q, k, v, q_tokens, k_tokens):
    T, K = q.shape[1], k.shape[2]
    q = cut(_scaled(plan, q), plan.q_size, plan.rows, K)
    k, v = (cut(x, plan.k_size, plan.rows, K) for x in (k, v))
    v = jax.lax.optimization_barrier(v.swapaxes(-1, -2))  # transposed once, not once a tile
    q_tokens, k_tokens = cut_tokens(q_tokens, plan.q_size, plan.rows), cut_tokens(k_tokens, plan.k_size, plan.rows)
    out, lse = jax.lax.map(lambda group: _forward_group(plan, *group), (q, k, v, q_tokens, k_tokens))
    return uncut(out, plan.q_size, T), uncut(lse, plan.q_size, T)


def _forward_group(plan, q, k, v, q_tokens, k_tokens):
    def query_tile(tile):
        q, q_tokens, state = tile

        def step(j, masked, carry):
            out, top, total = carry
            k_j, v_j, k_tokens_j = pick((k, v, k_tokens), j)
            s = _scores(plan, k_j, q)
            s = _hidden(plan, s, q_tokens, k_tokens_j) if masked else s
            peak = jnp.maximum(top, s.max(axis=-2))
            p, decay = jnp.exp(s - peak[..., None, :]), jnp.exp(top - peak)
            out = out * decay[..., None, :] + _dot("rkej,rkji->rkei", v_j, p.astype(v.dtype))
            return out, peak, total * decay + p.sum(axis=-2)

        row = _zeros(q.shape[:-1], (q, k, v, q_tokens, k_tokens))
        out = jnp.broadcast_to(row[..., None, :], (*q.shape[:-2], v.shape[-2], q.shape[-2]))
        out, top, total = over_tiles(state, step, (out, row + LOW, row))
        sees = top > LOW / 2
        total = jnp.where(sees, total, 1)
        out = jnp.where(sees[..., None, :], out / total[..., None, :], 0)
        return out.swapaxes(-1, -2), jnp.where(sees, top + jnp.log(total), -jnp.inf)

    return jax.lax.map(query_tile, (q, q_tokens, states(plan.mask, q_tokens, k_tokens)))


def _backward(plan, saved, cotangents):
    q, k, v, q_tokens, k_tokens, out, lse = saved
    d_out, d_lse = cotangents
    T, S, K = q.shape[1], k.shape[1], k.shape[2]
    delta = jnp.sum(d_out * out, axis=-1) - d_lse
    lse = jnp.where(lse == -jnp.inf, -LOW, lse)  # exp(s - lse) is 0 for rows that see nothing
    queries = tuple(cut(x, plan.q_size, plan.rows, K) for x in (_scaled(plan, q), d_out.astype(v.dtype), lse, delta))
    queries = (*queries, cut_tokens(q_tokens, plan.q_size, plan.rows))
    k_cut, v_cut = (cut(x, plan.k_size, plan.rows, K) for x in (k, v))
    keys = (k_cut, jax.lax.optimization_barrier(k_cut.swapaxes(-1, -2)), v_cut, cut_tokens(k_tokens, plan.k_size, plan.rows))
    dq, dk, dv = jax.lax.map(lambda group: _backward_group(plan, *group), (queries, keys))
    dq = uncut(dq, plan.q_size, T) * plan.scale
    dk, dv = uncut(dk, plan.k_size, S), uncut(dv, plan.k_size, S)
    dk = dk if _scale_in_query(q) else dk * plan.scale
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _backward_group(plan, queries, keys):
    def key_tile(dq, tile):
        (k, k_transposed, v, k_tokens), state = tile

        def step(i, masked, carry):
            dq, dk, dv = carry
            q, d_out, lse, delta, q_tokens = pick(queries, i)
            s = _scores(plan, k, q)
            slope = 1 if plan.softcap is None else 1 - jnp.square(s / plan.softcap)
            s = _hidden(plan, s, q_tokens, k_tokens) if masked else s
            p = jnp.exp(s - lse[..., None, :])
            ds = p * (_dot("rkje,rkie->rkji", v, d_out) - delta[..., None, :]) * slope
            p, ds = p.astype(d_out.dtype), ds.astype(q.dtype)
            dq_i = pick(dq, i) + _dot("rkdj,rkji->rkdi", k_transposed, ds)
            dq = jax.lax.dynamic_update_index_in_dim(dq, dq_i, i, 0)
            return dq, dk + _dot("rkji,rkid->rkjd", ds, q), dv + _dot("rkji,rkie->rkje", p, d_out)

        nothing = _zeros((), (queries, keys))
        dk, dv = nothing + jnp.zeros(k.shape), nothing + jnp.zeros(v.shape)
        dq, dk, dv = over_tiles(state, step, (dq, dk, dv))
        return dq, (dk, dv)

    q = queries[0]
    dq = _zeros((), (queries, keys)) + jnp.zeros((*q.shape[:-2], q.shape[-1], q.shape[-2]))
    state = states(plan.mask, queries[-1], keys[-1]).T
    dq, (dk, dv) = jax.lax.scan(key_tile, dq, (keys, state))
    return dq.swapaxes(-1, -2), dk, dv


_attention.defvjp(_save, _backward)


def _scale_in_query(q):
    return q.dtype == jnp.float32  # narrower types would round the scaled query


def _scaled(plan, q):
    return q * plan.scale if _scale_in_query(q) else q


def _scores(plan, k, q):
    s = _dot("rkjd,rkid->rkji", k, q)
    s = s if _scale_in_query(q) else s * plan.scale
    return s if plan.softcap is None else plan.softcap * jnp.tanh(s / plan.softcap)


def _hidden(plan, s, q_tokens, k_tokens):
    """Scores with LOW where the pair is not visible."""
    seen = visible(plan.mask, q_tokens, k_tokens)
    by_head = s.reshape(*s.shape[:3], -1, q_tokens.index.shape[-1])
    return jnp.where(seen, by_head, LOW).reshape(s.shape)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _zeros(shape, like):
    """Zeros that vary over the same mesh axes as the arrays `like`, so that they can start a loop inside shard_map."""
    known = functools.reduce(jnp.logical_and, (leaf.ravel()[0] == leaf.ravel()[0] for leaf in jax.tree.leaves(like)))
    return jnp.broadcast_to(jnp.where(known, 0.0, 0.0), shape)
