"""Tile sizes of the Triton kernels and the shared memory of a multiprocessor that they take.

What stays is held once, what passes by `copies` times: one is computed with while others come. Bytes, with R = G bq rows:
    forward      q + copies (k + v)       dq      q + dout + copies (k + v)       dk, dv      k + v + copies (q + dout)
and rows of tokens and sums. They bound what the Triton compiler allocates (3.9, for compute capabilities 8.0 and 9.0). The
targets are the fastest of those tried on an H200 (docs/performance.md).
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.target import device_kind
from pallas_kernels.tile_attention.blocks import Shape, Sizes
from pallas_kernels.tile_attention.gpu_arrays import power_of_two

SMALLEST = 16  # tokens of a tile, and elements of a head: the least that a matrix product takes
KIB = 1 << 10
SHARED = {"H100": 227 * KIB, "H200": 227 * KIB, "A100": 163 * KIB}  # of one program
ANY = 99 * KIB  # on every GPU since compute capability 8.0


class Tile(NamedTuple):
    """Powers of two: rows of queries, in which heads of a key head are stacked if the call has few tokens, and keys.

    Of a program: its warps, and the stages of its loop; three or four hold two copies of what passes by.
    """

    q: int
    k: int
    warps: int = 4
    stages: int = 3


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The tile of each kernel."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile

    def __post_init__(self):
        for field in dataclasses.fields(self):
            tile = getattr(self, field.name)
            if any(n < SMALLEST or n & (n - 1) for n in (tile.q, tile.k)):
                raise ValueError(f"{field.name} = {(tile.q, tile.k)}: expected powers of two from {SMALLEST}")

    @classmethod
    def same(cls, q: int, k: int) -> "Blocks":
        """One size for all kernels."""
        return cls(*(Tile(q, k),) * 3)


def shared_bytes(name: str, shape: Shape, tile: Tile, dtype: Any) -> int:
    """Shared memory that a program of a kernel takes."""
    size = sizes(name, shape, tile)
    R, copies = size.G * size.bq, max(2, (tile.stages + 1) // 2)
    elements = {
        "forward": R * size.D + copies * size.bk * (size.D + size.E),
        "query_gradient": (R + copies * size.bk) * (size.D + size.E),
        "key_gradient": (size.bk + copies * R) * (size.D + size.E),
    }
    return elements[name] * jnp.dtype(dtype).itemsize + 8 * copies * (R + size.bk)


def choose_blocks(
    shape: Shape, dtype: Any, gpu: str | None, given: Blocks | None = None, listed: tuple[int, int] | None = None
) -> Blocks:
    """Tiles that fit the shared memory of a GPU (None: any), from the kernels' targets; ValueError if `given` do not.

    listed: queries and keys of the tiles of a list, of which each is a tile of a kernel or several of them.
    """
    room = SHARED.get(gpu, ANY)
    tiles = {}
    if listed is not None and any(n < SMALLEST or n & (n - 1) for n in listed):
        raise ValueError(f"a list of tiles of {listed}: expected powers of two from {SMALLEST} in the Triton form")
    for name in TARGETS:
        tile = getattr(given, name) if given else _target(name, shape, dtype)
        if listed is not None:
            tile = tile._replace(q=min(tile.q, listed[0]), k=min(tile.k, listed[1]))
        while given is None and shared_bytes(name, shape, tile, dtype) > room and max(tile.q, tile.k) > SMALLEST:
            tile = tile._replace(q=tile.q // 2) if tile.q >= tile.k else tile._replace(k=tile.k // 2)
        if (takes := shared_bytes(name, shape, tile, dtype)) > room:
            raise ValueError(
                f"{name} = {(tile.q, tile.k)} with heads of {shape.D} and {shape.E} in {jnp.dtype(dtype).name} takes"
                f" {takes / KIB:.0f} KiB of shared memory: expected at most {room / KIB:.0f} on {gpu or 'any GPU'}"
            )
        tiles[name] = tile
    return Blocks(**tiles)


def sizes(name: str, shape: Shape, tile: Tile) -> Sizes:
    """Of a kernel, tiles no longer than the call. The kernel of dk and dv takes query heads one at a time."""
    bq, bk = min(tile.q, _padded(shape.T)), min(tile.k, _padded(shape.S))
    most = 1 if name == "key_gradient" else tile.q // bq
    G = next(n for n in (128, 64, 32, 16, 8, 4, 2, 1) if n <= most and shape.G % n == 0)
    return Sizes(G, bq, bk, _padded(shape.D), _padded(shape.E))


def parts(size: Sizes, shape: Shape, listed: tuple[int, int] | None) -> tuple[int, int]:
    """Tiles of a kernel in one of a list, down and across."""
    if listed is None:
        return 1, 1
    return min(listed[0], _padded(shape.T)) // size.bq, min(listed[1], _padded(shape.S)) // size.bk


def this_gpu() -> str | None:
    """The name in `SHARED` of the mesh's device or of this machine's, None if it has none."""
    kind = device_kind()
    return next((name for name in SHARED if name in kind), None)


def _target(name: str, shape: Shape, dtype: Any) -> Tile:
    wide = sum(max(shape.D, shape.E) > widest for widest in WIDEST)
    return FLOAT32 if jnp.dtype(dtype).itemsize == 4 else TARGETS[name][wide]


def _padded(n: int) -> int:
    return max(SMALLEST, power_of_two(n))


FLOAT32 = Tile(32, 32)  # products without tensor cores
WIDEST = (64, 128)  # heads, of the targets of each kernel but the last
TARGETS = {
    "forward": (Tile(64, 64), Tile(128, 64), Tile(128, 64, warps=8, stages=2)),
    "query_gradient": (Tile(64, 64), Tile(64, 64), Tile(64, 32)),
    "key_gradient": (Tile(64, 64), Tile(64, 64), Tile(32, 32)),
}
