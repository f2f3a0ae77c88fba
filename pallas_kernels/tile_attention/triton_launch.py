"""Runs a GPU kernel: one program a tile of its outputs, a group of heads and a batch row; what it finds where, and its list."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from pallas_kernels.tile_attention.blocks import Sizes
from pallas_kernels.tile_attention.gpu_arrays import KIND
from pallas_kernels.tile_attention.gpu_lists import Lists
from pallas_kernels.tile_attention.triton_blocks import Tile


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


def launch(
    kernel: Callable,
    programs: Programs,
    lists: Lists,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, tuple[int, ...]],
    flops: int,
    tile: Tile,
    interpret: bool,
) -> tuple[Array, ...]:
    """The outputs in float32, by name and shape; `flops` of one pair of a query and a key, of the work without a mask.

    The kernel gets a program's list and, by name, its inputs and outputs.
    """
    B, groups, majors, _ = lists.ends.shape
    group = lambda h: 0 if groups == 1 else jax.lax.div(h, jnp.int32(programs.heads // groups))
    minors = pl.BlockSpec((None, None, lists.minors.shape[2]), lambda i, h, b: (b, group(h), 0))
    ends = pl.BlockSpec((None, None, None, 3), lambda i, h, b: (b, group(h), programs.tile(i), 0))
    in_specs = [minors, ends, *(programs.spec(name, x.shape) for name, x in inputs.items())]
    out_specs = [programs.spec(name, shape) for name, shape in outputs.items()]
    pairs = B * inputs["q"].shape[2] * inputs["q"].shape[1] * inputs["k"].shape[1]
    each = sum(x.dtype.itemsize * _size(spec) for x, spec in zip(inputs.values(), in_specs[2:], strict=True))
    each += 4 * sum(map(_size, (*in_specs[:2], *out_specs)))
    call = pl.pallas_call(
        lambda minors, ends, *refs: kernel(minors, ends, SimpleNamespace(**dict(zip((*inputs, *outputs), refs, strict=True)))),
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
    return tuple(call(*lists, *inputs.values()))


def _size(spec: pl.BlockSpec) -> int:
    return math.prod(n for n in spec.block_shape if n is not None)
