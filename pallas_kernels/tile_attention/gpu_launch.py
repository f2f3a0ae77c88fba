"""Runs a GPU kernel: one program a tile of its outputs, a group of heads and a batch row; what it finds where, and its list.

Arrays go by the names that the kernels give them, and a name says the layout:
    q, d_out, out, dq [B, T, H, width]   k, v, dk, dv [B, S, K, width]   lse, delta [B, H, T]   q_tokens [B, 4, T], k_tokens
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Int32

from pallas_kernels.tile_attention.blocks import Sizes
from pallas_kernels.tile_attention.gpu_blocks import Tile, padded_width
from pallas_kernels.tile_attention.tile_list import tile_states
from pallas_kernels.tile_attention.tiling import EMPTY, FULL
from pallas_kernels.tile_attention.tokens import Mask, Tokens, pad_tokens

KINDS = {
    "query": ("q", "d_out", "out", "dq"),
    "row": ("lse", "delta"),
    "q_tokens": ("q_tokens",),
    "key": ("k", "v", "dk", "dv"),
    "k_tokens": ("k_tokens",),
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}


class Programs(NamedTuple):
    """The grid is [tiles, heads, B]. For each kind of array the block of a program without its width, and where it lies."""

    tiles: int
    heads: int
    tile: Callable  # that the i-th programs keep
    query: tuple[tuple, Callable]
    row: tuple[tuple, Callable]
    q_tokens: tuple[tuple, Callable]
    key: tuple[tuple, Callable]
    k_tokens: tuple[tuple, Callable]

    def spec(self, name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        block, place = getattr(self, KIND[name])
        return pl.BlockSpec(block if len(block) == len(shape) else (*block, shape[-1]), place)


def programs_of_queries(size: Sizes, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> Programs:
    """A tile of queries and a stack of heads stay. The last tiles, which see most under a causal mask, start first."""
    (_, T, H, _), (_, S, K, _) = q_shape, k_shape
    tiles, stacks = T // size.bq, H // size.G
    tile = lambda i: tiles - 1 - i
    key_head = lambda h: h if stacks == K else jax.lax.div(h, jnp.int32(stacks // K))
    return Programs(
        tiles,
        stacks,
        tile,
        query=((None, size.bq, size.G), lambda i, h, b: (b, tile(i), h, 0)),
        row=((None, size.G, size.bq), lambda i, h, b: (b, h, tile(i))),
        q_tokens=((None, 4, size.bq), lambda i, h, b: (b, 0, tile(i))),
        key=((None, S, None), lambda i, h, b: (b, 0, key_head(h), 0)),
        k_tokens=((None, 4, S), lambda i, h, b: (b, 0, 0)),
    )


def programs_of_keys(size: Sizes, q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> Programs:
    """A tile of keys of one head stays, its query heads pass by."""
    (_, T, H, _), (_, S, K, _) = q_shape, k_shape
    return Programs(
        S // size.bk,
        K,
        lambda i: i,
        query=((None, T, H // K), lambda i, h, b: (b, 0, h, 0)),
        row=((None, H // K, T), lambda i, h, b: (b, h, 0)),
        q_tokens=((None, 4, T), lambda i, h, b: (b, 0, 0)),
        key=((None, size.bk, None), lambda i, h, b: (b, i, h, 0)),
        k_tokens=((None, 4, size.bk), lambda i, h, b: (b, 0, i)),
    )


def padded(size: Sizes, arrays: Mapping[str, Array | Tokens]) -> dict[str, Array]:
    """Zeros appended up to whole tiles and padded head sizes; tokens as one array."""
    return {name: _padded(name, x, size.bk if KIND[name] in ("key", "k_tokens") else size.bq) for name, x in arrays.items()}


def states(
    mask: Mask, size: Sizes, q_tokens: Int32[Array, "B 4 T"], k_tokens: Int32[Array, "B 4 S"]
) -> Int32[Array, "B nq nk"]:
    cut = lambda x, size: x.reshape(*x.shape[:2], -1, size).swapaxes(1, 2)
    return tile_states(mask, cut(q_tokens, size.bq), cut(k_tokens, size.bk))


def launch(
    kernel: Callable,
    programs: Programs,
    state: Int32[Array, "B majors minors"],
    inputs: Mapping[str, Array],
    outputs: Mapping[str, tuple[int, ...]],
    flops: int,
    tile: Tile,
    interpret: bool,
) -> tuple[Array, ...]:
    """The outputs in float32, by name and shape; `flops` of one pair of a query and a key, of the work without a mask."""
    B, majors, minors = state.shape
    listed = lambda width: pl.BlockSpec((None, None, width), lambda i, h, b: (b, programs.tile(i), 0))
    in_specs = [listed(minors), listed(2), *(programs.spec(name, x.shape) for name, x in inputs.items())]
    out_specs = [programs.spec(name, shape) for name, shape in outputs.items()]
    pairs = B * inputs["q"].shape[2] * inputs["q"].shape[1] * inputs["k"].shape[1]
    each = sum(x.dtype.itemsize * _size(spec) for x, spec in zip(inputs.values(), in_specs[2:], strict=True))
    each += 4 * sum(map(_size, (*in_specs[:2], *out_specs)))
    call = pl.pallas_call(
        kernel,
        grid=(majors, programs.heads, B),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs.values()],
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        cost_estimate=pl.CostEstimate(
            flops=pairs * flops, transcendentals=pairs, bytes_accessed=majors * programs.heads * B * each
        ),
        interpret=interpret,
    )
    return tuple(call(*_lists(state), *inputs.values()))


def _lists(state: Int32[Array, "B majors minors"]) -> tuple[Int32[Array, "B majors minors"], Int32[Array, "B majors 2"]]:
    """Of every major tile, its minor tiles: full, partial, empty; and where the full and the partial ones end."""
    minors = state.shape[-1]
    order = jnp.sort(state * minors + jnp.arange(minors, dtype=jnp.int32), axis=-1) % minors
    ends = jnp.stack([(state == FULL).sum(-1, dtype=jnp.int32), (state != EMPTY).sum(-1, dtype=jnp.int32)], axis=-1)
    return order, ends


def _padded(name: str, x: Array | Tokens, tile: int) -> Array:
    if isinstance(x, Tokens):
        return jnp.stack([field.astype(jnp.int32) for field in pad_tokens(x, tile)], axis=1)
    if KIND[name] == "row":
        return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % tile)])
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile), (0, 0), (0, padded_width(x.shape[3]) - x.shape[3])])


def _size(spec: pl.BlockSpec) -> int:
    return math.prod(n for n in spec.block_shape if n is not None)
