"""Tile sizes of the GPU kernels and the shared memory that they take."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tile_attention.blocks import Shape, Sizes

SMALLEST = 16  # tokens of a tile: the least that a matrix product takes
ROWS = 128  # of stacked queries


class Tile(NamedTuple):
    """(query, key) tokens, warps of a program, tiles under way at once."""

    q: int
    k: int
    warps: int = 4
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class Blocks:
    forward: Tile
    query_gradient: Tile
    key_gradient: Tile

    @classmethod
    def same(cls, *tile: int) -> "Blocks":
        return cls(*(Tile(*tile),) * 3)


def padded_width(width: int) -> int:
    return max(SMALLEST, 1 << (width - 1).bit_length())


def stacked_heads(G: int, tile: Tile) -> int:
    return next(n for n in (64, 32, 16, 8, 4, 2, 1) if G % n == 0 and (n == 1 or n * tile.q <= ROWS))


def choose_blocks(shape, dtype, gpu, given=None):
    return given or Blocks.same(32, 32)


def this_gpu():
    return None
