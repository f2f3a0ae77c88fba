"""Runs a kernel over a list of tiles: the grid, copies of tiles into vector memory, ranges of outputs for a long list.

Arrays are tile-major. Those of the major axis stay while the kernel goes over tiles of the minor axis; tokens come last:
    q, k, v and their like [B, tiles, 1, heads, rows, width]   `tiling.cut`; rows: of G stacked query heads, or of one key head
    tokens                 [B, tiles, 4, tokens]               index, order, segments, roles
Query heads come in stacks of G; several stacks may share a key head, and then each has its own gradient of it.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.tile_attention import tile_list
from pallas_kernels.tile_attention.tile_list import FIRST, KIND, LAST, MAJOR, MINOR, Entries
from pallas_kernels.tile_attention.tiling import FULL, PARTIAL

Arrays = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """start(refs), step(masked, refs), finish(refs): at the first tile of an output, at each, at the last.

    refs: by `names`, of the major arrays, minor arrays, outputs, scratch. A pair of scores costs `flops` and one exponential.
    """

    names: tuple[str, ...]
    start: Callable
    step: Callable
    finish: Callable
    outputs: tuple[tuple[int, int], ...]  # rows and width of one tile, float32
    scratch: tuple[tuple[int, int], ...]
    flops: int
    vmem: int  # bytes

    def __call__(self, entry, *refs):
        kind, named = entry & KIND, SimpleNamespace(**dict(zip(self.names, refs, strict=True)))
        pl.when(entry & FIRST != 0)(lambda: self.start(named))
        pl.when(kind == FULL)(lambda: self.step(False, named))
        pl.when(kind == PARTIAL)(lambda: self.step(True, named))
        pl.when(entry & LAST != 0)(lambda: self.finish(named))


def sweep(
    kernel: Kernel, majors: Arrays, minors: Arrays, entries: Callable[[Any, Array], Entries], parts: int, interpret: Any
) -> Arrays:
    """The outputs [B, tiles, 1, stacks, rows, width] of the major tiles, in `parts` ranges.

    entries: of a range, from the place of its first tile and the tokens of its tiles.
    """
    if parts == 1:
        return _launch(kernel, majors, minors, entries(0, majors[-1]), interpret)
    B, n = majors[0].shape[:2]
    each = -(-n // parts)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, parts * each - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, parts, each, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, parts * each, *x.shape[3:])[:, :n]

    def one(part):
        first, majors = part
        return _launch(kernel, majors, minors, entries(first, majors[-1]), interpret)

    outs = jax.lax.map(one, (jnp.arange(parts, dtype=jnp.int32) * each, jax.tree.map(split, majors)))
    return tuple(join(out) for out in outs)


def parts_of(lists: int, majors: int, minors: int, length: int | None = None) -> int:
    """Ranges of major tiles such that their lists, a row or head each, fit the scalar memory; `length` of given ones."""
    fits = minors <= tile_list.MINORS
    if fits and length is not None and majors <= tile_list.MAJORS and lists * (length + majors) <= tile_list.ENTRIES:
        return 1
    most = min(tile_list.ENTRIES // (lists * minors), tile_list.MAJORS)
    if most == 0 or not fits:
        raise ValueError(
            f"{lists} rows of {majors} x {minors} tiles: a list holds {tile_list.ENTRIES} tiles and {tile_list.MINORS} of the"
            " minor axis; take larger blocks or fewer rows a call"
        )
    return -(-majors // most)


def _launch(kernel: Kernel, majors: Arrays, minors: Arrays, entries: Entries, interpret: Any) -> Arrays:
    packed, longest = entries
    B, n = majors[0].shape[:2]
    stacks = max(x.shape[3] for x in (*majors, *minors) if x.ndim == 6)
    groups, length = packed.shape[1:]
    pairs = B * stacks * length * majors[0].shape[-2] * minors[0].shape[-2]

    def own(stack, heads):  # not `//`, whose sign asks which chip this machine has
        return jax.lax.div(stack, jnp.int32(stacks // heads)) if 1 < heads < stacks else stack if heads > 1 else 0

    def entry(b, h, i, codes):
        return codes[(b * groups + own(h, groups)) * length + i]

    def major(*at):
        return entry(*at) >> MAJOR

    def minor(*at):
        return (entry(*at) >> MINOR) & ((1 << (MAJOR - MINOR)) - 1)

    def spec(shape, tile):
        if len(shape) == 4:
            return pl.BlockSpec((None, None, *shape[2:]), lambda *at: (at[0], tile(*at), 0, 0))
        return pl.BlockSpec((None, None, None, None, *shape[4:]), lambda *at: (at[0], tile(*at), 0, own(at[1], shape[3]), 0, 0))

    def body(codes, *refs):
        kernel(entry(*(pl.program_id(axis) for axis in range(3)), codes), *refs)

    outputs = [(B, n, 1, stacks, *tile) for tile in kernel.outputs]
    moved = sum(x.size * x.dtype.itemsize for x in majors) + 4 * sum(map(math.prod, outputs))
    moved += length * sum(x.size // x.shape[1] * x.dtype.itemsize for x in minors)
    call = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, stacks, longest),
            in_specs=[spec(x.shape, major) for x in majors] + [spec(x.shape, minor) for x in minors],
            out_specs=[spec(shape, major) for shape in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in kernel.scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=kernel.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=pairs * kernel.flops, transcendentals=pairs, bytes_accessed=moved),
        interpret=interpret,
    )
    return tuple(call(packed.reshape(-1), *majors, *minors))
