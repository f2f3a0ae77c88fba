"""Attention in tiles, in plain XLA: memory linear in length, nothing computed for tiles that no pair can see.

FlashAttention-2 (2023). Forward, for a query tile, over its key tiles, then out = o / l and lse = m + log l:
    s = q k^T,   m' = max(m, max_k s),   p = exp(s - m'),   l = l exp(m - m') + sum_k p,   o = o exp(m - m') + p v
Backward is given lse and delta; for a key tile, over its query tiles, with scores held keys first, so that every product
is a plain matrix product and no matrix of scores is transposed (delta and the whole softmax: `op.py`):
    s = k q^T,   p = exp(s - lse),   ds = p (v dout^T - delta),   dv += p dout,   dk += ds q,   dq^T += k^T ds
Products are taken in the dtype of the inputs and summed in float32; the softmax is float32.
A row that sees nothing gives out = 0, lse = -inf and zero gradients.

Few queries, as of a token that is decoded, see all keys at once: nothing is cut up, and keys are read once where they lie.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.target import platform, precision
from pallas_kernels.tile_attention.scores import LOW, sees_nothing
from pallas_kernels.tile_attention.tile_list import TileList
from pallas_kernels.tile_attention.tiling import (
    EMPTY,
    FULL,
    PARTIAL,
    cut,
    cut_tokens,
    over_tiles,
    pick,
    states,
    tile_size,
    uncut,
)
from pallas_kernels.tile_attention.tokens import Along, Bias, Mask, Tokens, distance

FEW = 8  # queries
SCORES = 1 << 26  # numbers: of few queries at once
TOGETHER = 8  # key heads, at most, that one product takes


class Sizes(NamedTuple):
    """Of a tile, in tokens, and how many rows share one list of tiles."""

    q: int
    k: int
    rows: int


class Plan(NamedTuple):
    """What is static: the mask, the logits, what a bias is linear in, and the sizes."""

    mask: Mask
    scale: float
    softcap: float | None
    along: Along | None
    sizes: Sizes


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
    sizes: Sizes | None = None,
    tiles: TileList | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. tiles: the only ones to compute, of `sizes` with one row a list."""
    if q.shape[1] == 0 or k.shape[1] == 0:
        return jnp.zeros((*q.shape[:-1], v.shape[-1])), jnp.full(q.shape[:-1], -jnp.inf)
    if tiles is not None and tiles.rows.shape[1] > 1:
        (*given, slopes), tiles = _apart((q, k, v, q_tokens, k_tokens, bias and bias.slopes), tiles)
        options = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias and bias._replace(slopes=slopes)}
        return tuple(_together(x, q.shape[0]) for x in forward(*given, tiles=tiles, sizes=sizes, **options))
    plan = Plan(mask, scale, softcap, bias and bias.along, sizes or choose_sizes(q.shape, k.shape))
    if tiles is None and sizes is None and q.shape[1] <= FEW and q[..., 0].size * k.shape[1] <= SCORES:
        return _few(plan, q, k, v, bias and bias.slopes, q_tokens, k_tokens)
    T, K, (q_size, k_size, rows) = q.shape[1], k.shape[2], plan.sizes
    q = cut(_scaled(plan, q), q_size, rows, K)
    k, v = (cut(x, k_size, rows, K) for x in (k, v))
    slopes = None if bias is None else cut(bias.slopes, q_size, rows, K)
    q_tokens, k_tokens = cut_tokens(q_tokens, q_size, rows), cut_tokens(k_tokens, k_size, rows)
    out, lse = jax.lax.map(lambda group: _forward_group(plan, *group), (q, k, v, slopes, q_tokens, k_tokens, tiles))
    return uncut(out, q_size, T), uncut(lse, q_size, T)


def _few(plan, q, k, v, slopes, q_tokens, k_tokens):
    """`forward` of few queries, all keys at once."""
    (B, T, H, _), K = q.shape, k.shape[2]
    heads = lambda x: jnp.moveaxis(x.reshape(B, T, K, H // K, *x.shape[3:]), 1, 3).reshape(B, K, -1, *x.shape[3:])
    slopes = None if slopes is None else heads(slopes)
    s = _logits(plan, _keys_met(heads(_scaled(plan, q)), k), q.dtype)
    s = _biased(plan, s, slopes, q_tokens.rows(), k_tokens.columns(), 2)
    s = _hide(s, plan.mask.visible(q_tokens.rows(), k_tokens.columns()), 2)
    top = s.max(axis=-1)
    p = jnp.exp(s - top[..., None])
    total = p.sum(axis=-1)
    out = _values_met(p.astype(v.dtype), v)
    blind = sees_nothing(top, total)
    out = jnp.where(blind[..., None], 0, out / total[..., None])
    lse = jnp.where(blind, -jnp.inf, top + jnp.log(total))
    back = lambda x: jnp.moveaxis(x.reshape(B, K, H // K, T, *x.shape[3:]), 3, 1).reshape(B, T, H, *x.shape[3:])
    return back(out), back(lse)


def _keys_met(q, k):
    """[R, K, n, S] of q [R, K, n, D] and k [R, S, K, D], which lies as it is: of few heads in one product, queries of the
    others' channels being 0."""
    K = k.shape[2]
    if K > TOGETHER:
        return _dot("rknd,rskd->rkns", q, k)
    apart = jnp.eye(K, dtype=q.dtype)[:, None, :, None] * q[:, :, :, None]
    found = _dot("rnc,rsc->rns", apart.reshape(len(q), -1, K * q.shape[3]), k.reshape(*k.shape[:2], -1))
    return found.reshape(*q.shape[:3], -1)


def _values_met(p, v):
    """[R, K, n, E] of p [R, K, n, S] and v [R, S, K, E]."""
    K = v.shape[2]
    if K > TOGETHER:
        return _dot("rkns,rske->rkne", p, v)
    found = _dot("rns,rsc->rnc", p.reshape(len(p), -1, p.shape[3]), v.reshape(*v.shape[:2], -1))
    found = found.reshape(*p.shape[:3], K, -1)
    return jnp.einsum("rknke->rkne", found)


def choose_sizes(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> Sizes:
    """Measured by `bench`. Few queries get longer key tiles; rows share a list of tiles until a step has enough work.

    On a CPU wide key tiles win over small ones that fit the cache: XLA runs the small batched products on one thread.
    """
    (B, T, H, _), S = q_shape, k_shape[1]
    if platform() == "cpu":
        q_target, k_target = (128, 128) if max(T, S) <= 512 else (256, 512)
        work = 1 << 20
    else:
        q_target, k_target, work = 512, 1024, 1 << 23
    q_size = tile_size(T, q_target)
    k_size = tile_size(S, min(4096, max(k_target, q_target * k_target // q_size)))
    rows = next(n for n in range(1, B + 1) if B % n == 0 and (n == B or n * H * q_size * k_size >= work))
    return Sizes(q_size, k_size, rows)


def _forward_group(plan, q, k, v, slopes, q_tokens, k_tokens, tiles):
    def query_tile(tile):
        q, slopes, q_tokens, state = tile

        def step(j, masked, carry):
            out, top, total = carry
            k_j, v_j, k_tokens_j = pick((k, v, k_tokens), j)
            s = _logits(plan, _dot("rkid,rkjd->rkij", q, k_j), q.dtype)
            s = _biased(plan, s, slopes, q_tokens.rows(), k_tokens_j.columns(), 2)
            if masked:
                s = _hide(s, _seen(plan, state[j], q_tokens.rows(), k_tokens_j.columns()), 2)
            peak = jnp.maximum(top, s.max(axis=-1))
            p = jnp.exp(s - peak[..., None])
            decay = jnp.exp(top - peak)
            out = out * decay[..., None] + _dot("rkij,rkje->rkie", p.astype(v.dtype), v_j)
            return out, peak, total * decay + p.sum(axis=-1)

        row = _zeros(q.shape[:-1], (q, k, v, q_tokens, k_tokens))
        out = jnp.broadcast_to(row[..., None], (*q.shape[:-1], v.shape[-1]))
        out, top, total = over_tiles(state, step, (out, row + LOW, row))
        blind = sees_nothing(top, total)
        out = jnp.where(blind[..., None], 0, out / total[..., None])
        return out, jnp.where(blind, -jnp.inf, top + jnp.log(total))

    return jax.lax.map(query_tile, (q, slopes, q_tokens, _states(plan, q_tokens, k_tokens, tiles)))


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    lse: Float[Array, "B T H"],
    delta: Float[Array, "B T H"],
    d_out: Float[Array, "B T H E"],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
    sizes: Sizes | None = None,
    tiles: TileList | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Returns (dq, dk, dv) in float32. lse and delta are those of the whole softmax, of which these keys may be a part."""
    if q.shape[1] == 0 or k.shape[1] == 0:
        return tuple(jnp.zeros(x.shape) for x in (q, k, v))
    if tiles is not None and tiles.rows.shape[1] > 1:
        (*given, slopes), tiles = _apart((q, k, v, q_tokens, k_tokens, lse, delta, d_out, bias and bias.slopes), tiles)
        options = {"mask": mask, "scale": scale, "softcap": softcap, "bias": bias and bias._replace(slopes=slopes)}
        dq, dk, dv = (_together(x, q.shape[0]) for x in backward(*given, tiles=tiles, sizes=sizes, **options))
        return dq, *(x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]).sum(axis=3) for x in (dk, dv))
    plan = Plan(mask, scale, softcap, bias and bias.along, sizes or choose_sizes(q.shape, k.shape))
    T, S, K, (q_size, k_size, rows) = q.shape[1], k.shape[1], k.shape[2], plan.sizes
    lse = jnp.where(lse == -jnp.inf, -LOW, lse)  # exp(s - lse) is 0 for rows that see nothing
    queries = tuple(cut(x, q_size, rows, K) for x in (_scaled(plan, q), d_out.astype(v.dtype), lse, delta))
    slopes = None if bias is None else cut(bias.slopes, q_size, rows, K)
    queries = (*queries, slopes, cut_tokens(q_tokens, q_size, rows))
    keys = (*(cut(x, k_size, rows, K) for x in (k, v)), cut_tokens(k_tokens, k_size, rows))
    dq, dk, dv = jax.lax.map(lambda group: _backward_group(plan, *group), (queries, keys, tiles))
    dk, dv = uncut(dk, k_size, S), uncut(dv, k_size, S)
    return uncut(dq, q_size, T) * scale, dk if q.dtype == jnp.float32 else dk * scale, dv


def _backward_group(plan, queries, keys, tiles):
    def key_tile(dq, tile):
        (k, v, k_tokens), state = tile
        k_transposed = jax.lax.optimization_barrier(k.swapaxes(-1, -2))

        def step(i, masked, carry):
            dq, dk, dv = carry
            q, d_out, lse, delta, slopes, q_tokens = pick(queries, i)
            s = _logits(plan, _dot("rkjd,rkid->rkji", k, q), q.dtype)
            steepness = 1 if plan.softcap is None else 1 - jnp.square(s / plan.softcap)
            s = _biased(plan, s, slopes, q_tokens.columns(), k_tokens.rows(), 3)
            if masked:
                s = _hide(s, _seen(plan, state[i], q_tokens.columns(), k_tokens.rows()), 3)
            p = jnp.exp(s - lse[..., None, :])
            ds = p * (_dot("rkje,rkie->rkji", v, d_out) - delta[..., None, :]) * steepness
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
    state = _states(plan, queries[-1], keys[-1], tiles).T
    dq, (dk, dv) = jax.lax.scan(key_tile, dq, (keys, state))
    return dq.swapaxes(-1, -2), dk, dv


def _states(plan, q_tokens, k_tokens, tiles):
    """FULL, PARTIAL or EMPTY of every tile of a group: by the mask, or as listed, EMPTY where a list leaves a tile out."""
    if tiles is None:
        return states(plan.mask, q_tokens, k_tokens)
    (nq, nk), (rows, cols, kind, count) = (x.index.shape[0] for x in (q_tokens, k_tokens)), (x[0] for x in tiles)
    listed = (jnp.arange(rows.shape[0]) < count) & (kind != EMPTY)
    found = jnp.full((nq, nk), EMPTY, jnp.int32)
    return found.at[jnp.where(listed, rows, nq), cols].set(kind.astype(jnp.int32), mode="drop")


def _apart(arrays, tiles):
    """Each list's heads as rows of their own, key heads repeated where a list is of one of their query heads."""
    B, groups, _ = tiles.rows.shape

    def one(x):
        if x is None:
            return None
        if isinstance(x, Tokens):
            return Tokens(*(jnp.repeat(field, groups, axis=0) for field in x))
        x = jnp.repeat(x, max(1, groups // x.shape[2]), axis=2)
        x = x.reshape(B, x.shape[1], groups, -1, *x.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(B * groups, x.shape[1], *x.shape[3:])

    return tuple(map(one, arrays)), TileList(*(x.reshape(B * groups, 1, *x.shape[2:]) for x in tiles))


def _together(x, B):
    """Inverse of `_apart`, the repeats of key heads still apart."""
    x = jnp.moveaxis(x.reshape(B, -1, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _scaled(plan, q):
    return q * plan.scale if q.dtype == jnp.float32 else q  # a narrower type would round the scaled query


def _logits(plan, s, dtype):
    s = s if dtype == jnp.float32 else s * plan.scale
    return s if plan.softcap is None else plan.softcap * jnp.tanh(s / plan.softcap)


def _biased(plan, s, slopes, q_tokens, k_tokens, heads):
    """Scores with the bias of their distance; axes of s as in `_hide`, slopes [R, K, heads and queries]."""
    if slopes is None:
        return s
    away = jnp.expand_dims(distance(q_tokens, k_tokens, plan.along).astype(jnp.float32), (1, heads))
    split = (*s.shape[:heads], s.shape[heads] // away.shape[heads + 1], *away.shape[heads + 1 :])
    slopes = slopes[..., None] if heads == 2 else slopes[..., None, :]
    slopes = jnp.broadcast_to(slopes, s.shape).reshape(split)
    return (s.reshape(split) - slopes * away).reshape(s.shape)


def _seen(plan, state, q_tokens, k_tokens):
    """1.0 where a pair is visible. A conditional is not fused into its users: computed once a tile, not once a use and head."""
    everything = lambda: (q_tokens.index == q_tokens.index) & (k_tokens.index == k_tokens.index)
    visible = lambda: plan.mask.visible(q_tokens, k_tokens)
    forms = {FULL: everything, PARTIAL: visible, EMPTY: lambda: ~everything()}
    return jax.lax.switch(state, [lambda form=forms[kind]: form().astype(jnp.float32) for kind in sorted(forms)])


def _hide(s, seen, heads):
    """Scores with LOW where the pair is not seen. Axis `heads` of s [R, K, ., .] stacks a group's heads; seen [R, ., .]."""
    seen = jnp.expand_dims(seen, (1, heads))
    split = (*s.shape[:heads], s.shape[heads] // seen.shape[heads + 1], *seen.shape[heads + 1 :])
    return jnp.where(seen > 0, s.reshape(split), LOW).reshape(s.shape)


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _zeros(shape, like):
    """Zeros that vary over the same mesh axes as the arrays `like`, so that they can start a loop inside shard_map."""
    known = functools.reduce(jnp.logical_and, (leaf.ravel()[0] == leaf.ravel()[0] for leaf in jax.tree.leaves(like)))
    return jnp.broadcast_to(jnp.where(known, 0.0, 0.0), shape)
