"""The list of tiles that a kernel walks through: which pairs of a query tile and a key tile are worth computing.

A kernel keeps the output of one tile of the major axis (queries, or keys for their gradients) while it goes over tiles of the
minor axis. An entry is one int32 in scalar memory; in the order of these numbers the tiles of an output are neighbours:
    major << 18 | minor << 4 | last << 3 | first << 2 | kind,      kind: FULL 0, PARTIAL 1, EMPTY 2
`first` and `last` mark where an output begins and where it is written. A major tile without any tile to compute has one EMPTY
entry, which writes its zeros; entries behind the end repeat the last one as EMPTY, so that they neither copy nor compute.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int8, Int32

from pallas_kernels.tile_attention.tiling import EMPTY, FULL, PARTIAL
from pallas_kernels.tile_attention.tokens import Mask, Tiles, Tokens, tiles

KIND, FIRST, LAST = 3, 4, 8
MAJOR, MINOR = 18, 4  # shifts
MAJORS, MINORS = (1 << 13) - 1, 1 << 14  # tiles that fit an entry
ENTRIES = 250_000  # of one call: scalar memory is 1 MiB
KINDS = 4  # two bits
UNLISTED = jnp.iinfo(jnp.int32).max


class TileList(NamedTuple):
    """Tiles chosen by the caller, each at most once, in any order; `groups` is 1, K or H: one list for all heads or one a head.

    The first `count` places are the tiles. FULL says that every pair is visible: the mask is left out. `verified` sees to it.
    """

    rows: Int32[Array, "B groups A"]  # query tiles
    cols: Int32[Array, "B groups A"]  # key tiles
    kind: Int8[Array, "B groups A"]
    count: Int32[Array, "B groups"]

    def transposed(self) -> "TileList":
        """With keys as the major axis."""
        return self._replace(rows=self.cols, cols=self.rows)


class Entries(NamedTuple):
    """Packed entries, and the length of the longest list."""

    packed: Int32[Array, "B groups A"]
    longest: Int32[Array, ""]


def tile_states(mask: Mask, q: Int[Array, "B nq 4 bq"], k: Int[Array, "B nk 4 bk"]) -> Int32[Array, "B nq nk"]:
    """FULL, PARTIAL or EMPTY for every tile; tile-major tokens, their fields on the third axis."""

    def statistics(x):
        each = tiles(Tokens(*(x[:, :, field] for field in range(4))), x.shape[-1])  # one tile a row
        return Tiles(*(field[..., 0] for field in each))

    return kinds(*mask.bounds(statistics(q).rows(), statistics(k).columns()))


def from_states(states: Int32[Array, "B majors minors"]) -> Entries:
    """The tiles that are not EMPTY, and the first tile of a major tile that has no other."""
    major, minor = (jnp.arange(n, dtype=jnp.int32) for n in states.shape[1:])
    nothing = (states == EMPTY).all(axis=-1, keepdims=True)
    listed = (states != EMPTY) | (nothing & (minor == 0))
    packed = jnp.where(listed, major[:, None] << MAJOR | minor << MINOR | states, UNLISTED)
    return _finished(_joined(jnp.sort(packed, axis=-1))[:, None])


def from_list(given: TileList, majors: int, minors: int = MINORS, first: Int[Array, ""] | int = 0) -> Entries:
    """The tiles of a list on the `majors` rows from `first` on, and an EMPTY one where a row has none."""
    rows = given.rows - first
    real = jnp.arange(rows.shape[-1]) < given.count[..., None]
    real &= (given.kind != EMPTY) & (rows >= 0) & (rows < majors)
    packed = jnp.where(real, rows << MAJOR | given.cols << MINOR | given.kind.astype(jnp.int32), UNLISTED)
    nothing = jnp.arange(majors, dtype=jnp.int32) << MAJOR | EMPTY
    nothing = jnp.where(_visited(jnp.where(real, rows, majors), majors), UNLISTED, nothing)
    packed = jnp.sort(jnp.concatenate([packed, nothing], axis=-1), axis=-1)
    return _finished(packed[..., : majors * minors])


def verified(given: TileList, mask: Mask, q: Tiles, k: Tiles) -> TileList:
    """The same tiles, by row and column, with kinds that the mask's bounds bear out: FULL only where every pair is visible.

    Tiles that are listed twice, that the mask makes empty or that lie outside the arrays are EMPTY. q, k: statistics of the
    tiles of either axis [B, tiles].
    """
    nq, nk = q.index_low.shape[-1], k.index_low.shape[-1]
    if nq * nk >= UNLISTED // KINDS:
        raise ValueError(f"{nq} x {nk} tiles: expected fewer than {UNLISTED // KINDS}; take larger blocks")
    rows, cols = given.rows, given.cols
    real = (jnp.arange(rows.shape[-1]) < given.count[..., None]) & (given.kind != EMPTY)
    real &= (rows >= 0) & (rows < nq) & (cols >= 0) & (cols < nk)
    may, must = mask.bounds(_at(q, jnp.clip(rows, 0, nq - 1)), _at(k, jnp.clip(cols, 0, nk - 1)))
    code = jnp.sort(jnp.where(real, (rows * nk + cols) * KINDS + kinds(may, must), UNLISTED), axis=-1)
    place = jnp.where(code == UNLISTED, 0, code // KINDS)
    again = jnp.pad(place[..., 1:] == place[..., :-1], [(0, 0), (0, 0), (1, 0)])
    kind = jnp.where(again | (code == UNLISTED), EMPTY, code % KINDS)
    return TileList(place // nk, place % nk, kind.astype(jnp.int8), (code != UNLISTED).sum(axis=-1, dtype=jnp.int32))


def kinds(may: Bool[Array, "..."], must: Bool[Array, "..."]) -> Int32[Array, "..."]:
    """FULL, PARTIAL or EMPTY of tiles with these bounds."""
    return jnp.where(must, FULL, jnp.where(may, PARTIAL, EMPTY)).astype(jnp.int32)


def _at(given: Tiles, places: Int32[Array, "B groups A"]) -> Tiles:
    """The statistics of the tiles at some places of each row, gathered all fields at once."""
    fields = jnp.stack([field.astype(jnp.int32) for field in given], axis=-1)
    taken = jax.vmap(lambda line, at: line[at])(fields, places)
    return Tiles(*(taken[..., n].astype(field.dtype) for n, field in enumerate(given)))


def _visited(rows: Int32[Array, "B groups A"], majors: int) -> Bool[Array, "B groups majors"]:
    B, groups, _ = rows.shape
    at = jnp.arange(B)[:, None, None], jnp.arange(groups)[:, None], rows
    return jnp.zeros((B, groups, majors), bool).at[at].set(True, mode="drop")


def _joined(packed: Int32[Array, "B majors minors"]) -> Int32[Array, "B A"]:
    """Row behind row without gaps: each is written where the last one ends. One sort of them all takes seconds to compile."""
    B, majors, minors = packed.shape
    count = (packed != UNLISTED).sum(axis=-1, dtype=jnp.int32)
    starts = jnp.cumsum(count, axis=-1) - count

    def write(i, line):
        b, row = i // majors, i % majors
        return jax.lax.dynamic_update_slice(line, packed[b, row][None], (b, starts[b, row]))

    line = jnp.full((B, (majors + 1) * minors), UNLISTED, jnp.int32)
    return jax.lax.fori_loop(0, B * majors, write, line)[:, : majors * minors]


def _finished(packed: Int32[Array, "B groups A"]) -> Entries:
    listed, major = packed != UNLISTED, packed >> MAJOR
    count = listed.sum(axis=-1, dtype=jnp.int32)
    edge = [(0, 0), (0, 0), (1, 1)]
    beside = jnp.pad(major, edge, constant_values=-1)
    first, last = beside[..., :-2] != major, beside[..., 2:] != major
    marked = packed | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
    end = jnp.take_along_axis(packed, count[..., None] - 1, axis=-1)
    return Entries(jnp.where(listed, marked, (end & -(1 << MINOR)) | EMPTY), count.max())
