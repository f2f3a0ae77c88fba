"""Attention in tiles for Hopper GPUs (Pallas, Mosaic GPU): FlashAttention-3 (2024) over lists of tiles, in bfloat16.

A program of a kernel (`hopper_kernels`) goes over one row of the lists (`gpu_lists`). Arrays keep their layout and are padded
to whole tiles, head sizes to 64, 128 or 256. Tile sizes and shared memory: `hopper_blocks`.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as mosaic
from jaxtyping import Array, Float

from pallas_kernels.tile_attention import hopper_kernels
from pallas_kernels.tile_attention.blocks import Shape, Sizes, shape_of
from pallas_kernels.tile_attention.gpu_arrays import padded
from pallas_kernels.tile_attention.gpu_lists import Lists, of_keys, of_queries, split
from pallas_kernels.tile_attention.hopper_blocks import MAJOR, TOGETHER, Blocks, choose_blocks, padded_width
from pallas_kernels.tile_attention.scores import Scores, in_base_2
from pallas_kernels.tile_attention.tile_list import TileList
from pallas_kernels.tile_attention.tokens import Mask, Tokens


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
    blocks: Blocks | None = None,
    tiles: TileList | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32. `tiles`: of 128 queries and 128 keys. Raises ValueError for what does not fit."""
    shape = shape_of(q, k, v)
    if shape.T == 0 or shape.S == 0:
        return jnp.zeros((*q.shape[:3], shape.E)), jnp.full(q.shape[:3], -jnp.inf)
    passing = choose_blocks(shape, blocks, None if tiles is None else MAJOR).forward
    size = _sizes(shape, MAJOR, passing.tokens)
    given = padded(size, {"q": q, "q_tokens": q_tokens, "k": k, "v": v, "k_tokens": k_tokens})
    B, T, H, _ = given["q"].shape
    work = hopper_kernels.Work(Scores(mask, scale, softcap), *passing)
    lists = of_queries(mask, size, given, split(tiles, 1, MAJOR // size.bk))
    out, lse = _launch(hopper_kernels.forward, work, lists, H, given, [(B, T, H, size.E), (B, H, T)])
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
    blocks: Blocks | None = None,
    tiles: TileList | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Returns (dq, dk, dv) in float32; lse and delta of the whole softmax, as in `gpu.backward`."""
    shape = shape_of(q, k, v)
    if shape.T == 0 or shape.S == 0:
        return tuple(jnp.zeros(x.shape) for x in (q, k, v))
    chosen, scores = choose_blocks(shape, blocks, None if tiles is None else MAJOR), Scores(mask, scale, softcap)
    lse, delta = (x.swapaxes(1, 2) for x in in_base_2(lse, delta))
    arrays = {"q": q, "d_out": d_out.astype(v.dtype), "lse": lse, "delta": delta, "q_tokens": q_tokens}
    arrays |= {"k": k, "v": v, "k_tokens": k_tokens}

    passing = chosen.query_gradient
    size = _sizes(shape, MAJOR, passing.tokens)
    given = padded(size, arrays)
    work, lists = hopper_kernels.Work(scores, *passing), of_queries(mask, size, given, split(tiles, 1, MAJOR // size.bk))
    (dq,) = _launch(hopper_kernels.query_gradient, work, lists, q.shape[2], given, [given["q"].shape])

    passing = chosen.key_gradient
    size = _sizes(shape, passing.tokens, MAJOR)
    given = padded(size, arrays)
    lists = of_keys(mask, size, given, split(tiles, MAJOR // size.bq, 1))
    shapes, found = {"dv": given["v"].shape, "dk": given["k"].shape}, {}
    for wanted in (tuple(shapes),) if size.D + size.E <= TOGETHER else zip(shapes):
        work = hopper_kernels.Work(scores, *passing, wanted)
        grads = _launch(hopper_kernels.key_gradient, work, lists, k.shape[2], given, [shapes[name] for name in wanted])
        found |= dict(zip(wanted, grads, strict=True))
    dk, dv = found["dk"], found["dv"]
    return dq[:, : shape.T, :, : shape.D], dk[:, : shape.S, :, : shape.D], dv[:, : shape.S, :, : shape.E]


def _launch(
    kernel: Callable,
    work: hopper_kernels.Work,
    lists: Lists,
    heads: int,
    inputs: Mapping[str, Array],
    outputs: list[tuple[int, ...]],
) -> tuple[Array, ...]:
    """The outputs in float32, of the shapes given."""
    B, _, majors, _ = lists.ends.shape
    call = mosaic.kernel(
        functools.partial(kernel, work),
        out_type=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
        grid=(heads, majors, B),
        grid_names=("head", "tile", "row"),
        num_threads=hopper_kernels.GROUPS + 1,
        thread_name="group",
        compiler_params=mosaic.CompilerParams(approx_math=True),
    )
    return tuple(call(*lists, *inputs.values()))


def _sizes(shape: Shape, bq: int, bk: int) -> Sizes:
    return Sizes(1, bq, bk, padded_width(shape.D), padded_width(shape.E))
