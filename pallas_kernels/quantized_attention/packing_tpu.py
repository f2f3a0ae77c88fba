"""Packing on TPUs (Pallas, Mosaic): XLA lays out the few rows of a plane padded, and moves several times what is needed.

A tile is of 128 channels; the t-th tokens of all its blocks are read and written in strides, as the attention kernel does.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, UInt8, UInt32

from pallas_kernels.tpu_chips import LANES

TILES = (1024, 512, 256)  # tokens, eight rows of words at least
BLOCK = 32  # tokens that fill whole words


def taken(tokens: int, channels: int) -> bool:
    """Whether tokens are a tile, or whole tiles."""
    return channels % LANES == 0 and tokens % BLOCK == 0 and (0 < tokens <= TILES[0] or tokens % TILES[-1] == 0)


def pack(
    codes: UInt8[Array, "*n T D"], planes: tuple[int, ...], *, interpret: Any = False
) -> tuple[UInt32[Array, "*n _ D"], ...]:
    """As `packing.pack` does. planes: widths."""
    *lead, T, D = codes.shape
    tile, N = _tile(T), math.prod(lead)
    blocks = tile // BLOCK

    def body(given, *refs):
        *out, wide = refs
        wide[...] = given[...].astype(jnp.int32)
        write_words(wide, out, planes)

    words = pl.pallas_call(
        body,
        grid=(N, T // tile, D // LANES),
        in_specs=[_rows(tile)],
        out_specs=[_rows(blocks * width) for width in planes],
        out_shape=[jax.ShapeDtypeStruct((N, T // BLOCK * width, D), jnp.uint32) for width in planes],
        scratch_shapes=[pltpu.VMEM((tile, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
    )(codes.reshape(N, T, D))
    return tuple(x.reshape(*lead, -1, D) for x in words)


def write_words(wide, out, planes: tuple[int, ...]) -> None:
    """In a kernel: codes of a scratch [T, D] as words of each plane."""
    blocks, below = wide.shape[0] // BLOCK, 0
    for width, ref in zip(planes, out, strict=True):
        for row in range(width):
            word = jnp.zeros((blocks, wide.shape[1]), jnp.int32)
            for place in range(BLOCK // width):
                field = wide[pl.ds(place * width + row, blocks, BLOCK), :] >> below & ((1 << width) - 1)
                word = word | field << (place * width)
            ref[pl.ds(row, blocks, width), :] = jax.lax.bitcast_convert_type(word, jnp.uint32)
        below += width


def unpack(
    words: tuple[UInt32[Array, "*n _ D"], ...], planes: tuple[int, ...], *, interpret: Any = False
) -> UInt8[Array, "*n T D"]:
    """As `packing.unpack` does."""
    *lead, rows, D = words[0].shape
    T, N = rows // planes[0] * BLOCK, math.prod(lead)
    tile = _tile(T)
    blocks = tile // BLOCK

    def body(*refs):
        *given, out, wide = refs
        for token in range(BLOCK):
            code, below = None, 0
            for width, ref in zip(planes, given, strict=True):
                place, row = divmod(token, width)
                word = jax.lax.bitcast_convert_type(ref[pl.ds(row, blocks, width), :], jnp.int32)
                field = jax.lax.shift_right_logical(word, jnp.int32(place * width)) & ((1 << width) - 1)
                code, below = field if code is None else code | field << below, below + width
            wide[pl.ds(token, blocks, BLOCK), :] = code
        out[...] = wide[...].astype(jnp.uint8)

    return pl.pallas_call(
        body,
        grid=(N, T // tile, D // LANES),
        in_specs=[_rows(blocks * width) for width in planes],
        out_specs=_rows(tile),
        out_shape=jax.ShapeDtypeStruct((N, T, D), jnp.uint8),
        scratch_shapes=[pltpu.VMEM((tile, LANES), jnp.int32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
    )(*(x.reshape(N, -1, D) for x in words)).reshape(*lead, T, D)


def _rows(rows: int) -> pl.BlockSpec:
    """So many of 128 channels."""
    return pl.BlockSpec((None, rows, LANES), lambda n, i, c: (n, i, c))


def _tile(tokens: int) -> int:
    return next((tile for tile in TILES if tokens % tile == 0), tokens)
