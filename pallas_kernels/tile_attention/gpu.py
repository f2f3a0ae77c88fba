"""Attention in tiles for GPUs: in the Hopper form where it serves (`hopper_blocks.takes`, no bias), else through Triton.

A row that sees nothing gives out = 0 and lse = -inf.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.target import log_once
from pallas_kernels.tile_attention import gpu_few, hopper, triton
from pallas_kernels.tile_attention.blocks import shape_of
from pallas_kernels.tile_attention.hopper_blocks import MAJOR, takes
from pallas_kernels.tile_attention.tile_list import TileList
from pallas_kernels.tile_attention.tokens import Bias, Mask, Tokens
from pallas_kernels.tile_attention.triton_blocks import this_gpu


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
    tiles: TileList | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. `tiles` are of `tile` queries and keys, powers of two.

    Raises ValueError for what does not fit the shared memory of a GPU.
    """
    form, options = _form(q, k, v, scale, bias, tiles, tile)
    options |= {"mask": mask, "scale": scale, "softcap": softcap}
    if tiles is None and gpu_few.serves(q, k):
        return gpu_few.forward(form.forward, q, k, v, q_tokens, k_tokens, **options)
    return form.forward(q, k, v, q_tokens, k_tokens, **options)


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
    tiles: TileList | None = None,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Returns (dq, dk, dv) in float32.

    lse: of the whole softmax, over more keys than these if they are a shard; -inf for rows that see nothing, whose gradients
    are zero. delta = sum(d_out out) - d_lse, the sum over a head's E.
    """
    form, options = _form(q, k, v, scale, bias, tiles, tile)
    options |= {"mask": mask, "scale": scale, "softcap": softcap}
    each = 1 if tiles is None or tiles.rows.shape[1] in (1, k.shape[2]) else q.shape[2] // k.shape[2]
    if each == 1:
        return form.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out, **options)
    wide = (jnp.repeat(x, each, axis=2) for x in (k, v))  # a list for every query head: keys of its own, whose gradients add up
    dq, dk, dv = form.backward(q, *wide, q_tokens, k_tokens, lse, delta, d_out, **options)
    return dq, *(x.reshape(*k.shape[:3], each, x.shape[-1]).sum(axis=3) for x in (dk, dv))


def _form(q, k, v, scale, bias, tiles, tile):
    if (tiles is None) != (tile is None):
        raise ValueError(f"tile = {tile} {'without' if tiles is None else 'with'} a list of tiles: expected both or neither")
    shape, gpu = shape_of(q, k, v), this_gpu()
    if takes(shape, q.dtype, scale, gpu) and bias is None and (tiles is None or tile == (MAJOR, MAJOR)):
        form, options = hopper, {"tiles": tiles}
    else:
        form, options = triton, {"tiles": tiles, "tile": tile, "bias": bias}
    log_once(
        f"tile attention in the {form.__name__.rpartition('.')[2]} form on {gpu or 'this GPU'}: {jnp.dtype(q.dtype)}, {shape}"
    )
    return form, options
