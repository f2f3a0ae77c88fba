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


def all_pairs(index: Int[Array, "R M"], tokens: int, block: int, tile: int) -> Pairs:
    """Of places in any order: every tile meets every block."""
    R, blocks = len(index), -(-tokens // block)
    steps = -(-index.shape[1] // tile) * blocks
    step = jnp.broadcast_to(jnp.arange(steps), (R, steps))
    return Pairs(step // blocks, step % blocks, jnp.full(R, steps))


def gathered(
    wide: list[Array], narrow: list[Array], index: Int[Array, "R M"], *, growing: bool = True, interpret: Any = False
) -> tuple[list[Array], list[Array]]:
    """(arrays [R, M, D], arrays [R, M]): what arrays [R, N, D] and [R, N], of types of one, two or four bytes, hold at places
    of their tokens, which grow or may come in any order."""
    (R, M), N = index.shape, (wide or narrow)[0].shape[1]
    block, tile = min(BLOCK, N), min(TILE, M)
    turns = (pairs if growing else all_pairs)(index, N, block, tile)
    given = [*wide, *(x[:, None] if x.dtype.itemsize == 4 else _integers(x).astype(jnp.int32)[:, None] for x in narrow)]
    out = [jax.ShapeDtypeStruct((R, M, x.shape[2]), x.dtype) for x in wide]
    out += [jax.ShapeDtypeStruct((R, 1, M), x.dtype) for x in given[len(wide) :]]
    rows = lambda size, x, of: pl.BlockSpec((None, size, x.shape[2]), lambda r, p, *at: (r, at[of][r, p], 0))
    row = lambda size, of: pl.BlockSpec((None, 1, size), lambda r, p, *at: (r, 0, at[of][r, p]))
    sums = [*((tile, x.shape[2]) for x in wide), (max(1, len(narrow)), tile)]
    found = pl.pallas_call(
        functools.partial(_body, wide=len(wide), block=block),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(R, turns.tile.shape[1]),
            in_specs=[row(tile, 0), *(rows(block, x, 1) for x in wide), *[row(block, 1)] * len(narrow)],
            out_specs=[*(rows(tile, x, 0) for x in wide), *[row(tile, 0)] * len(narrow)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.int32) for shape in sums],
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
    back = lambda x, like: x if x.dtype == like.dtype else _of_integers(x, like.dtype)
    return list(found[: len(wide)]), [back(x[:, 0], like) for x, like in zip(found[len(wide) :], narrow, strict=True)]


def _integers(x: Shaped[Array, "*n"]) -> Int[Array, "*n"]:
    """The bits of numbers."""
    return jax.lax.bitcast_convert_type(x, INTEGER[x.dtype.itemsize])


def _of_integers(x: Int[Array, "*n"], dtype: Any) -> Array:
    """The numbers of bits."""
    return jax.lax.bitcast_convert_type(x.astype(INTEGER[jnp.dtype(dtype).itemsize]), dtype)


def _body(tiles, blocks, count, index, *refs, wide: int, block: int):
    several = (len(refs) - wide - 1) // 2
    given, out, sums = refs[:several], refs[several : 2 * several], refs[2 * several :]
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

        def more(total, x, size, product):
            """With what the block adds, byte by byte."""
            found = total[...]
            for shift in range(0, 8 * size, 8):
                part = (x >> shift & 255).astype(jnp.float32).astype(jnp.bfloat16)
                found = found | product(part).astype(jnp.int32) << shift
            total[...] = found

        dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
        fetch = lambda x: dot(ones, x, (((0,), (0,)), ((), ())))
        for ref, made, total in zip(given[:wide], out, sums, strict=False):
            more(total, _integers(ref[...]).astype(jnp.int32), ref.dtype.itemsize, fetch)
            made[...] = _of_integers(total[...], made.dtype)
        if several > wide:
            x = jnp.concatenate([_integers(ref[...]) for ref in given[wide:]], axis=0)
            more(sums[-1], x, 4, lambda x: dot(x, ones, (((1,), (0,)), ((), ()))))
            for n, made in enumerate(out[wide:]):
                made[...] = _of_integers(sums[-1][n : n + 1], made.dtype)
