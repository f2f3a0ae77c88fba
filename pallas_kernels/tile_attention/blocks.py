"""Tile sizes of the TPU kernels and the vector memory that they take.

Every array of a tile is held twice: one is computed with while the next is copied. Bytes, with R = G bq rows of queries:
    forward      2 (q + k + v + tokens + out + lse) + m + l + o
    dq           2 (q + dout + lse + delta + k + v + tokens + dq) + lse, delta as columns + sum
    dk, dv       2 (q + dout + lse + delta + k + v + tokens + dk + dv) + sums
and `_scores`: what is made of R bk products, in multiples found by lowering the compiler's limit (libtpu 0.0.42, five chips).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tpu_chips import LANES, MIB, kernel_room, padded_bytes

OWN = MIB // 2  # for the compiler
FLOAT32_SCORES = 1.5  # more arrays of scores where products are float32


class Sizes(NamedTuple):
    """Of a tile: query heads stacked, tokens of queries and of keys, head sizes as padded; whether scores have a bias."""

    G: int
    bq: int
    bk: int
    D: int
    E: int
    biased: bool = False


class Shape(NamedTuple):
    """Of a call: tokens of queries and of keys, query heads a key head, head sizes of keys and values; `biased` as above."""

    T: int
    S: int
    G: int
    D: int
    E: int
    biased: bool = False


def shape_of(q: Array, k: Array, v: Array) -> Shape:
    """Of q [B,T,H,D], k [B,S,K,D], v [B,S,K,E]. Raises ValueError for what the kernels do not take."""
    (T, H, D), (S, K, E) = q.shape[1:], v.shape[1:]
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: expected one for q, k and v, bfloat16 or float32")
    if H % K:
        raise ValueError(f"{H} query heads, {K} key heads: expected a multiple")
    return Shape(T, S, H // K, D, E)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """(query, key) tokens of a tile of each kernel, multiples of 128."""

    forward: tuple[int, int]
    query_gradient: tuple[int, int]
    key_gradient: tuple[int, int]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            sizes = getattr(self, field.name)
            if any(size < LANES or size % LANES for size in sizes):
                raise ValueError(f"{field.name} = {sizes}: expected multiples of {LANES}")

    @classmethod
    def same(cls, q: int, k: int) -> "Blocks":
        """One size for all kernels, as a list of tiles needs it."""
        return cls((q, k), (q, k), (q, k))


def forward_bytes(size: Sizes, dtype: Any) -> int:
    """VMEM of the forward kernel."""
    R = size.G * size.bq
    out = 2 * (_float32(R, size.E) + _float32(1, R))
    return _inputs(size, dtype) + out + _float32(R, 2 * LANES + size.E) + _scores(size, dtype, 2.0, 2.0)


def query_gradient_bytes(size: Sizes, dtype: Any) -> int:
    """VMEM of the kernel of dq."""
    R = size.G * size.bq
    out = 3 * _float32(R, size.D)
    return _inputs(size, dtype) + _cotangents(size, dtype) + out + _float32(R, 2 * LANES) + _scores(size, dtype, 2.0, 2.0)


def key_gradient_bytes(size: Sizes, dtype: Any) -> int:
    """VMEM of the kernel of dk and dv."""
    out = 3 * (_float32(size.bk, size.D) + _float32(size.bk, size.E))
    return _inputs(size, dtype) + _cotangents(size, dtype) + out + _scores(size, dtype, 4.0, 1.0)


def footprint(blocks: Blocks, G: int, D: int, E: int, dtype: Any, biased: bool = False) -> int:
    """Bytes of vector memory that the largest of the kernels takes."""
    return max(bytes_of(Sizes(G, *getattr(blocks, name), D, E, biased), dtype) for name, bytes_of, _ in KERNELS)


def stacked_heads(shape: Shape, dtype: Any, chip: str | None, given: Blocks | None = None) -> int:
    """The most heads of a group, a divisor of G, whose tiles (None: the smallest) fit the VMEM of a chip; 1 if none do."""
    blocks = given or Blocks.same(LANES, LANES)
    fits = lambda G: footprint(blocks, G, shape.D, shape.E, dtype, shape.biased) <= kernel_room(chip)
    return next((G for G in range(shape.G, 1, -1) if shape.G % G == 0 and fits(G)), 1)


def choose_blocks(shape: Shape, dtype: Any, chip: str | None, given: Blocks | None = None) -> Blocks:
    """Sizes that fit the VMEM of a chip (None: the smallest), from the kernels' targets; ValueError if `given` do not."""
    room = kernel_room(chip)
    sizes = {}
    for name, bytes_of, targets in KERNELS:
        bq, bk = getattr(given, name) if given else _start(shape, dtype, *targets)
        takes = lambda bq, bk, bytes_of=bytes_of: bytes_of(Sizes(shape.G, bq, bk, *shape[3:]), dtype)
        while given is None and takes(bq, bk) > room and max(bq, bk) > LANES:
            if bk > LANES and (bk > shape.G * bq or bq == LANES):
                bk = _half(bk)
            else:
                bq = _half(bq)
        if takes(bq, bk) > room:
            raise ValueError(
                f"{name} = {(bq, bk)} with {shape.G} stacked heads of {shape.D} and {shape.E} in {jnp.dtype(dtype).name} takes"
                f" {takes(bq, bk) / MIB:.1f} MiB of vector memory: expected at most {room / MIB:.1f} on {chip or 'any chip'}"
            )
        sizes[name] = (bq, bk)
    return Blocks(**sizes)


def _start(shape: Shape, dtype: Any, rows: int, keys: int) -> tuple[int, int]:
    """`rows` of stacked queries and `keys` tokens, half of each in float32, no longer than the call."""
    if jnp.dtype(dtype).itemsize == 4:
        rows, keys = rows // 2, keys // 2  # products take longer to compile and hold more
    whole = lambda n: -(-n // LANES) * LANES
    return min(max(rows // shape.G // LANES, 1) * LANES, whole(shape.T)), min(keys, whole(shape.S))


def _half(size: int) -> int:
    return size // 2 // LANES * LANES


def _inputs(size: Sizes, dtype: Any) -> int:
    tokens = _float32(4, size.bq) + _float32(4, size.bk)
    wide = _padded(size.G * size.bq + size.bk, size.D, dtype) + _padded(size.bk, size.E, dtype)
    return 2 * (wide + tokens)


def _cotangents(size: Sizes, dtype: Any) -> int:
    R = size.G * size.bq
    return 2 * (_padded(R, size.E, dtype) + 2 * _float32(1, R))


def _scores(size: Sizes, dtype: Any, each: float, mask: float) -> int:
    """`each` float32 array of scores and `mask` int32 ones of pairs of tokens; float32 factors are split in three bfloat16."""
    columns = 8 * _float32(max(size.bq, size.bk), LANES)  # four fields of tokens before and after they are turned
    pairs = OWN + columns + each * _float32(size.G * size.bq, size.bk) + mask * _float32(size.bq, size.bk)
    if size.biased:  # slopes as rows and columns, distances of tokens and of stacked queries
        R = size.G * size.bq
        pairs += 2 * _float32(1, R) + _float32(R, LANES) + _float32(size.bq, size.bk) + _float32(R, size.bk)
    if jnp.dtype(dtype).itemsize < 4:
        return int(pairs)
    rows = size.G * size.bq + size.bk
    split = 3 * (_padded(rows, size.D, jnp.bfloat16) + _padded(rows, size.E, jnp.bfloat16))
    return int(pairs + _float32(size.G * size.bq, size.bk) * FLOAT32_SCORES + split)


def _padded(rows: int, width: int, dtype: Any) -> int:
    return padded_bytes((rows, width), jnp.dtype(dtype).itemsize)


def _float32(rows: int, width: int) -> int:
    return _padded(rows, width, jnp.float32)


KERNELS: tuple[tuple[str, Callable[[Sizes, Any], int], tuple[int, int]], ...] = (  # name, bytes, target rows and keys
    ("forward", forward_bytes, (1024, 1024)),
    ("query_gradient", query_gradient_bytes, (1024, 1024)),
    ("key_gradient", key_gradient_bytes, (1024, 512)),
)
