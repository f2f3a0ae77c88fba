"""Attention in tiles for TPUs (Pallas, Mosaic): FlashAttention-2 (2023) over a list of tiles, like JAX's splash attention.

The arrays are cut into tiles of one key head each (`tiling.cut`), the tiles that some pair can see are listed from the mask's
bounds (`tile_list`), a kernel (`tpu_kernels`) goes over the list (`tpu_sweep`). Tile sizes and memory: `blocks`.
A row that sees nothing gives out = 0 and lse = -inf.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.tile_attention import tpu_kernels
from pallas_kernels.tile_attention.blocks import Blocks, Sizes, choose_blocks, shape_of, stacked_heads
from pallas_kernels.tile_attention.scores import Scores, in_base_2
from pallas_kernels.tile_attention.tile_list import TileList, from_list, from_states, tile_states
from pallas_kernels.tile_attention.tiling import cut, cut_tokens, uncut
from pallas_kernels.tile_attention.tokens import Bias, Mask, Tokens
from pallas_kernels.tile_attention.tpu_sweep import parts_of, sweep
from pallas_kernels.tpu_chips import this_chip

HALF_LANES = 64


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
    blocks: Blocks | None = None,
    tiles: TileList | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. Raises ValueError for what does not fit the memories of a core.

    tiles: the only ones to compute, of `blocks` of one size.
    """
    shape = _shape(q, k, v, blocks, tiles, bias)
    if shape.T == 0 or shape.S == 0:
        return jnp.zeros((*q.shape[:3], shape.E)), jnp.full(q.shape[:3], -jnp.inf)
    bq, bk = _blocks(shape, q.dtype, blocks, tiles).forward
    size = _sizes(shape, bq, bk)
    queries = _cut(q, bq, size.G), *_cut_rows(_slopes(bias), bq, size.G), _cut_tokens(q_tokens, bq)
    keys = _cut(k, bk, 1), _cut(v, bk, 1), _cut_tokens(k_tokens, bk)
    kernel = tpu_kernels.forward(Scores(mask, scale, softcap, bias and bias.along), size, q.dtype)
    out, lse = sweep(kernel, queries, keys, *_listing(mask, queries, keys, tiles), interpret)
    return uncut(out, bq, shape.T)[..., : shape.E], uncut(lse[..., 0, :], bq, shape.T)


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
    blocks: Blocks | None = None,
    tiles: TileList | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Returns (dq, dk, dv) in float32.

    lse: of the whole softmax, over more keys than these if they are a shard; -inf for rows that see nothing, whose gradients
    are zero. delta = sum(d_out out) - d_lse, the sum over a head's E.
    """
    shape = _shape(q, k, v, blocks, tiles, bias)
    if shape.T == 0 or shape.S == 0:
        return tuple(jnp.zeros(x.shape) for x in (q, k, v))
    chosen = _blocks(shape, q.dtype, blocks, tiles)
    scores, G = Scores(mask, scale, softcap, bias and bias.along), shape.G
    rows = *in_base_2(lse, delta), *_slopes(bias)

    def arrays(bq, bk):
        queries = _cut(q, bq, G), _cut(d_out.astype(v.dtype), bq, G), *_cut_rows(rows, bq, G), _cut_tokens(q_tokens, bq)
        return _sizes(shape, bq, bk), queries, (_cut(k, bk, 1), _cut(v, bk, 1), _cut_tokens(k_tokens, bk))

    size, queries, keys = arrays(*chosen.query_gradient)
    kernel = tpu_kernels.query_gradient(scores, size, q.dtype)
    (dq,) = sweep(kernel, queries, keys, *_listing(mask, queries, keys, tiles), interpret)
    dq = uncut(dq, size.bq, shape.T)[..., : shape.D]

    size, queries, keys = arrays(*chosen.key_gradient)
    kernel = tpu_kernels.key_gradient(scores, size, q.dtype)
    dk, dv = sweep(kernel, keys, queries, *_listing(mask, queries, keys, tiles, "keys"), interpret)
    dk, dv = (uncut(x, size.bk, shape.S).reshape(*k.shape[:3], -1, x.shape[-1]).sum(axis=3) for x in (dk, dv))
    return dq, dk[..., : shape.D], dv[..., : shape.E]


def _shape(q, k, v, blocks, tiles, bias):
    shape = shape_of(q, k, v)._replace(biased=bias is not None)
    if tiles is not None and tiles.rows.shape[1] not in (1, k.shape[2]):
        return shape._replace(G=1)  # a list for every query head
    return shape._replace(G=stacked_heads(shape, q.dtype, this_chip(), blocks if tiles is not None else None))


def _blocks(shape, dtype, blocks, tiles):
    if tiles is not None and (blocks is None or blocks != Blocks.same(*blocks.forward)):
        raise ValueError(f"tiles with blocks = {blocks}: expected one size for all kernels, the one that the list is about")
    return choose_blocks(shape, dtype, this_chip(), blocks)


def _sizes(shape, bq, bk):
    return Sizes(shape.G, bq, bk, _padded(shape.D), _padded(shape.E), shape.biased)


def _padded(width: int) -> int:
    """Half a vector register's lanes, or whole ones."""
    return HALF_LANES if width <= HALF_LANES else -(-width // (2 * HALF_LANES)) * 2 * HALF_LANES


def _cut(x: Float[Array, "B T heads D"], size: int, stacked: int) -> Float[Array, "B n 1 stacks rows width"]:
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, _padded(x.shape[-1]) - x.shape[-1])])
    return cut(x, size, 1, x.shape[2] // stacked)


def _slopes(bias: Bias | None) -> tuple[Array, ...]:
    return () if bias is None else (bias.slopes,)


def _cut_rows(rows: tuple[Array, ...], size: int, stacked: int) -> tuple[Array, ...]:
    """[B, T, H] as [B, n, 1, stacks, 1, rows]."""
    return tuple(cut(x, size, 1, x.shape[2] // stacked)[..., None, :] for x in rows)


def _cut_tokens(tokens: Tokens, size: int) -> Int[Array, "B n 4 size"]:
    return jnp.concatenate(cut_tokens(tokens, size, 1), axis=2)


def _listing(mask, queries, keys, tiles, majors="queries"):
    """The entries of a range of the major axis, from its first tile and its tokens; and how many ranges."""
    (B, nq), nk = queries[-1].shape[:2], keys[-1].shape[1]
    by_query = majors == "queries"
    major, minor = (nq, nk) if by_query else (nk, nq)
    if tiles is not None:
        given, (groups, length) = tiles if by_query else tiles.transposed(), tiles.rows.shape[1:]
        parts = parts_of(B * groups, major, minor, length)
        return lambda first, tokens: from_list(given, tokens.shape[1], minor, first), parts
    parts = parts_of(B, major, minor)
    if by_query:
        return lambda _, q_tokens: from_states(tile_states(mask, q_tokens, keys[-1])), parts
    return lambda _, k_tokens: from_states(tile_states(mask, queries[-1], k_tokens).swapaxes(1, 2)), parts
