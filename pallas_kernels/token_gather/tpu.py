"""Tokens at growing places, on TPUs (Pallas, Mosaic): a product with ones where a token goes.

XLA fetches row after row. Here tiles of what is taken meet the blocks of what there is that hold some of them, a list of pairs
that the pipeline reads ahead; since places grow, a block is read once, and once more for each tile that ends in it. A number
goes through the product byte by byte, so that it arrives as it was, whatever its type.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, Shaped

BLOCK = 512  # tokens that are read at a time
TILE = 512  # and taken
INTEGER = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32}


class Pairs(NamedTuple):
    """For each row, which tile meets which block, step after step; from step `count` on there is nothing left to do."""

    tile: Int[Array, "R P"]
    block: Int[Array, "R P"]
    count: Int[Array, "R"]


def pairs(index: Int[Array, "R M"], tokens: int, block: int, tile: int) -> Pairs:
    """index: growing, from 0 to tokens - 1."""
    tiles = -(-index.shape[1] // tile)
    last = jnp.minimum(jnp.arange(1, tiles + 1) * tile, index.shape[1]) - 1
    low, high = index[:, ::tile] // block, index[:, last] // block
    ends = jnp.cumsum(high - low + 1, axis=1)
    step = jnp.arange(tiles + -(-tokens // block))
    at = jnp.minimum((step[:, None] >= ends[:, None]).sum(axis=2, dtype=jnp.int32), tiles - 1)
    own = lambda x: jnp.where(at[..., None] == jnp.arange(tiles), x[:, None], 0).sum(axis=2)
    return Pairs(at, jnp.minimum(own(high), own(high - ends + 1) + step), ends[:, -1])


def gathered(
    wide: list[Array], narrow: list[Array], index: Int[Array, "R M"], *, interpret: Any = False
) -> tuple[list[Array], list[Array]]:
    """(arrays [R, M, D], arrays [R, M]): what arrays [R, N, D] and [R, N], of types of one, two or four bytes, hold at growing
    places of their tokens."""
    (R, M), N = index.shape, (wide or narrow)[0].shape[1]
    block, tile = min(BLOCK, N), min(TILE, M)
    turns = pairs(index, N, block, tile)
    given = list(wide)
    read = [pl.BlockSpec((None, block, x.shape[2]), lambda r, p, tiles, blocks, _: (r, blocks[r, p], 0)) for x in given]
    made = [pl.BlockSpec((None, tile, x.shape[2]), lambda r, p, tiles, blocks, _: (r, tiles[r, p], 0)) for x in given]
    out = [jax.ShapeDtypeStruct((R, M, x.shape[2]), x.dtype) for x in given]
    sums = [pltpu.VMEM((tile, x.shape[2]), jnp.int32) for x in given]
    if narrow:
        n = len(narrow)
        given = [*given, jnp.stack([_integers(x).astype(jnp.int32) for x in narrow], axis=1)]
        read = [*read, pl.BlockSpec((None, n, block), lambda r, p, tiles, blocks, _: (r, 0, blocks[r, p]))]
        made = [*made, pl.BlockSpec((None, n, tile), lambda r, p, tiles, blocks, _: (r, 0, tiles[r, p]))]
        out = [*out, jax.ShapeDtypeStruct((R, n, M), jnp.int32)]
        sums = [*sums, pltpu.VMEM((n, tile), jnp.int32)]
    found = pl.pallas_call(
        functools.partial(_body, wide=len(wide), block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(R, turns.tile.shape[1]),
            in_specs=[pl.BlockSpec((None, 1, tile), lambda r, p, tiles, blocks, _: (r, 0, tiles[r, p])), *read],
            out_specs=made,
            scratch_shapes=sums,
        ),
        out_shape=out,
        cost_estimate=pl.CostEstimate(
            flops=2 * R * turns.tile.shape[1] * block * tile * sum(x.shape[-1] * x.dtype.itemsize for x in wide),
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*given, *out)) + index.size * 4,
            transcendentals=0,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(*turns, index[:, None], *given)
    back = lambda x, like: jax.lax.bitcast_convert_type(x.astype(INTEGER[like.dtype.itemsize]), like.dtype)
    return list(found[: len(wide)]), [back(found[-1][:, n], like) for n, like in enumerate(narrow)]


def _integers(x: Shaped[Array, "*n"]) -> Int[Array, "*n"]:
    """The bits of numbers."""
    return jax.lax.bitcast_convert_type(x, INTEGER[x.dtype.itemsize])


def _body(tiles, blocks, count, index, *refs, wide: int, block: int):
    given, out, sums = (refs[n * len(refs) // 3 : (n + 1) * len(refs) // 3] for n in range(3))
    r, p = pl.program_id(0), pl.program_id(1)

    @pl.when((p == 0) | (tiles[r, p] != tiles[r, jnp.maximum(p - 1, 0)]))
    def _():
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    @pl.when(p < count[r])
    def _():
        place = index[...] - blocks[r, p] * block
        ones = jax.lax.broadcasted_iota(jnp.int32, (block, place.shape[1]), 0) == place
        ones = ones.astype(jnp.float32).astype(jnp.bfloat16)
        for n, (ref, made, total) in enumerate(zip(given, out, sums, strict=True)):
            x, found = _integers(ref[...]).astype(jnp.int32), total[...]
            for byte in range(ref.dtype.itemsize):
                part = (x >> 8 * byte & 255).astype(jnp.float32).astype(jnp.bfloat16)
                operands, axes = ((ones, part), ((0,), (0,))) if n < wide else ((part, ones), ((1,), (0,)))
                one = jax.lax.dot_general(*operands, (axes, ((), ())), preferred_element_type=jnp.float32)
                found = found | one.astype(jnp.int32) << 8 * byte
            total[...] = found
            made[...] = jax.lax.bitcast_convert_type(found.astype(INTEGER[made.dtype.itemsize]), made.dtype)
