"""Codes of tokens in one pass on TPUs (Pallas, Mosaic): numbers are read once, and codes written, packed.

A tile is some tokens of a head. What a token shares is found, and written, with tokens along lanes: the tile is turned, coded
and turned back. Codes are packed as in `packing_tpu`, those of heads of more than 128 channels in a second pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.quantized_attention.packing import BLOCK, PLANES, pack
from pallas_kernels.quantized_attention.packing_tpu import write_words
from pallas_kernels.tpu_chips import LANES

TILES = 512, 256, 128  # tokens


def taken(coding: Any, x: Array) -> bool:
    """Whether the kernel codes these tokens."""
    *_, T, D = x.shape
    whole = coding.tokens is None or (coding.tokens % 8 == 0 and TILES[0] // coding.tokens % 16 == 0)
    return T % (TILES[0] if coding.tokens else TILES[-1]) == 0 < T and D % LANES == 0 and whole


def coded(coding: Any, x: Array, by_channel: tuple = (), by_head: tuple = (), *, interpret: Any = False) -> tuple[Any, tuple]:
    """As `coding.coded` does."""
    *lead, T, D = x.shape
    N, tile = x.size // (T * D), next(n for n in TILES if T % n == 0)
    planes = () if coding.bits is None or D > LANES else PLANES[coding.bits]
    known = [*(c.reshape(N, D, 1) for c in by_channel), *(h.reshape(N, 1, 1) for h in by_head)]

    def code(x, *known):
        known = tuple(known[: len(by_channel)]), tuple(known[len(by_channel) :])
        if coding.tokens is not None:
            codes, shared = coding.code(x.reshape(-1, coding.tokens, x.shape[1]), *known, 1)
            return codes.reshape(x.shape), [s.reshape(-1, x.shape[1]) for s in shared]
        codes, shared = coding.code(x.T, *known, 0)
        return codes.T, shared

    def body(given, *refs):
        values = [ref[...] for ref in refs[: len(known)]]
        out = refs[len(known) :]
        codes, shared = code(given[...].astype(jnp.float32), *values)
        if planes:
            *out, wide = out
            wide[...] = codes.astype(jnp.int32)
            write_words(wide, out[: len(planes)], planes)
        else:
            out[0][...] = cast(codes, coding.dtype)
        for ref, s in zip(out[max(1, len(planes)) :], shared, strict=True):
            ref[...] = s.astype(ref.dtype)

    like = jax.eval_shape(code, jax.ShapeDtypeStruct((T, D), jnp.float32), *(k[0] for k in known))
    rows = lambda n, D=D: pl.BlockSpec((None, n, D), lambda r, i: (r, i, 0))
    whole = lambda k: pl.BlockSpec((None, *k.shape[1:]), lambda r, i: (r, 0, 0))
    if planes:
        codes = [((T // BLOCK * width, D), jnp.uint32, rows(tile // BLOCK * width)) for width in planes]
    else:
        codes = [((T, D), coding.dtype, rows(tile))]
    if coding.tokens is None:
        shared = [((1, T), s.dtype, pl.BlockSpec((None, 1, tile), lambda r, i: (r, 0, i))) for s in like[1]]
    else:
        shared = [((T // coding.tokens, D), s.dtype, rows(tile // coding.tokens)) for s in like[1]]
    out_shape = [jax.ShapeDtypeStruct((N, *shape), dtype) for shape, dtype, _ in (*codes, *shared)]
    moved = sum(y.size * y.dtype.itemsize for y in (x, *known, *out_shape))
    found = pl.pallas_call(
        body,
        grid=(N, T // tile),
        in_specs=[rows(tile), *map(whole, known)],
        out_specs=[spec for _, _, spec in (*codes, *shared)],
        out_shape=out_shape,
        cost_estimate=pl.CostEstimate(flops=64 * x.size, bytes_accessed=moved, transcendentals=0),
        scratch_shapes=[pltpu.VMEM((tile, D), jnp.int32)] if planes else [],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(x.reshape(N, T, D), *known)
    by = (T,) if coding.tokens is None else (T // coding.tokens, D)
    made = tuple(y.reshape(*lead, *y.shape[1:]) for y in found[: len(codes)])
    of = tuple(y.reshape(*lead, *by) for y in found[len(codes) :])
    if planes or coding.bits is None:
        return made if planes else made[0], of
    return pack(made[0], coding.bits), of


def cast(codes: Float[Array, "..."], dtype: Any) -> Array:
    """Codes in their type, whole numbers by way of int32, as kernels can."""
    return (codes.astype(jnp.int32) if jnp.issubdtype(dtype, jnp.integer) else codes).astype(dtype)
