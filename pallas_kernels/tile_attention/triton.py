"""Attention in tiles for any GPU (Pallas, Triton): FlashAttention-2 (2023) over lists of tiles.

A program of a kernel (`triton_kernels`) goes over one row of the lists (`gpu_lists`, `triton_launch`). Arrays keep their layout
and are padded to whole tiles, head sizes to powers of two. Tile sizes and shared memory: `triton_blocks`.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_attention import triton_kernels
from pallas_kernels.tile_attention.blocks import shape_of
from pallas_kernels.tile_attention.gpu_arrays import padded, slopes_of
from pallas_kernels.tile_attention.gpu_lists import of_keys, of_queries, split
from pallas_kernels.tile_attention.scores import Scores, in_base_2
from pallas_kernels.tile_attention.tile_list import TileList
from pallas_kernels.tile_attention.tokens import Bias, Mask, Tokens
from pallas_kernels.tile_attention.triton_blocks import Blocks, choose_blocks, parts, sizes, this_gpu
from pallas_kernels.tile_attention.triton_launch import launch, programs_of_keys, programs_of_queries


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
    tile: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. `tiles` are of `tile` queries and keys, powers of two.

    Raises ValueError for what does not fit the shared memory of a GPU.
    """
    shape = _shape(q, k, v, tiles)
    if shape.T == 0 or shape.S == 0:
        return jnp.zeros((*q.shape[:3], shape.E)), jnp.full(q.shape[:3], -jnp.inf)
    passing = choose_blocks(shape, q.dtype, this_gpu(), blocks, tile).forward
    size = sizes("forward", shape, passing)
    given = padded(size, {"q": q, "q_tokens": q_tokens, "k": k, "v": v, "k_tokens": k_tokens} | slopes_of(bias))
    B, T, H, _ = given["q"].shape
    out, lse = launch(
        functools.partial(triton_kernels.forward, Scores(mask, scale, softcap, bias and bias.along), size),
        programs_of_queries(size, given["q"].shape, given["k"].shape),
        of_queries(mask, size, given, split(tiles, *parts(size, shape, tile))),
        given,
        {"out": (B, T, H, size.E), "lse": (B, H, T)},
        2 * (size.D + size.E),
        passing,
        interpret,
    )
    return out[:, : shape.T, :, : shape.E], lse[..., : shape.T].swapaxes(1, 2)


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
    tile: tuple[int, int] | None = None,
    interpret: bool = False,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Returns (dq, dk, dv) in float32; lse and delta of the whole softmax, as in `gpu.backward`."""
    shape = _shape(q, k, v, tiles)
    if shape.T == 0 or shape.S == 0:
        return tuple(jnp.zeros(x.shape) for x in (q, k, v))
    chosen = choose_blocks(shape, q.dtype, this_gpu(), blocks, tile)
    scores = Scores(mask, scale, softcap, bias and bias.along)
    lse, delta = (x.swapaxes(1, 2) for x in in_base_2(lse, delta))
    arrays = {"q": q, "d_out": d_out.astype(v.dtype), "lse": lse, "delta": delta, "q_tokens": q_tokens}
    arrays |= {"k": k, "v": v, "k_tokens": k_tokens} | slopes_of(bias)

    passing = chosen.query_gradient
    size = sizes("query_gradient", shape, passing)
    given = padded(size, arrays)
    programs = programs_of_queries(size, given["q"].shape, given["k"].shape)
    kernel = functools.partial(triton_kernels.query_gradient, scores, size)
    lists = of_queries(mask, size, given, split(tiles, *parts(size, shape, tile)))
    (dq,) = launch(kernel, programs, lists, given, {"dq": given["q"].shape}, 2 * (2 * size.D + size.E), passing, interpret)

    passing = chosen.key_gradient
    size = sizes("key_gradient", shape, passing)
    given = padded(size, arrays)
    programs = programs_of_keys(size, given["q"].shape, given["k"].shape)
    kernel = functools.partial(triton_kernels.key_gradient, scores, size)
    lists = of_keys(mask, size, given, split(tiles, *parts(size, shape, tile)))
    outputs = {"dk": given["k"].shape, "dv": given["v"].shape}
    dk, dv = launch(kernel, programs, lists, given, outputs, 4 * (size.D + size.E), passing, interpret)
    return dq[:, : shape.T, :, : shape.D], dk[:, : shape.S, :, : shape.D], dv[:, : shape.S, :, : shape.E]


def _shape(q, k, v, tiles):
    """Heads are not stacked where each has a list of its own."""
    shape = shape_of(q, k, v)
    return shape if tiles is None or tiles.rows.shape[1] in (1, k.shape[2]) else shape._replace(G=1)
