"""Learned positions: a row of a table for each place of a document, added to its tokens' embeddings (BERT, GPT-2).

A place is a token's position, its index unless rows or a rule give another. LongEmbed (Zhu et al. 2024) reads documents longer
than the table without training, by what a place p of n tokens reads:
    grouped      row p // ceil(n / rows)
    recurrent    row p mod rows
    interpolated row p of a table `factor` times as long, whose rows between two old ones are interpolated; documents that fit
                 the old table read every `factor`-th row, which are the old ones
Its tuning trains the rows between alone, the rest of the model frozen, on short documents moved to any place of the long table:
`between` `learned`, an experiment's `trainable` `position_table/between`, positions by `PoSE` of one chunk.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.batch import TokenInfo, lengths_of
from lcx.mixers.mixer import weight
from lcx.spec import Spec

Reading = Literal["plain", "grouped", "recurrent", "interpolated"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionTable(Spec):
    """rows: trained places. reading: see above; `plain` gives NaN beyond them, never another place's row. factor: of the
    interpolated table. between: rows between two old ones are their mean, weighted, or `learned`, beginning there."""

    rows: int
    reading: Reading = "plain"
    factor: int = 1
    between: Literal["interpolated", "learned"] = "interpolated"

    def validate(self):
        self.check(self.rows >= 1, "rows", "at least 1")
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.factor == 1 or self.reading == "interpolated", "factor", "1 where reading is not 'interpolated'")
        learns = self.between == "interpolated" or self.factor > 1
        self.check(learns, "between", "'interpolated' where factor is 1: no row is between two old ones")

    length_policy = "frozen"

    @property
    def reads_lengths(self) -> bool:
        """Whether a token's row depends on how long its document is."""
        return self.reading in ("grouped", "interpolated")

    @property
    def reach(self) -> int | None:
        """Tokens of the longest document that it reads; None if any."""
        return None if self.reading in ("grouped", "recurrent") else self.rows * self.factor

    def build(self, width: int, *, rngs: nnx.Rngs) -> "PositionTableModule":
        return PositionTableModule(self, width, rngs)

    def places(self, positions: Float[Array, "B T"], lengths: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """The old row of each token, -1 where the table has none, and how many of `factor` steps to the next."""
        place = jnp.round(positions).astype(jnp.int32)
        steps = jnp.zeros_like(place)
        if self.reading == "grouped":
            place = place // jnp.maximum(1, -(-lengths // self.rows))
        elif self.reading == "recurrent":
            place = place % self.rows
        elif self.reading == "interpolated":
            factor = jnp.where(lengths <= self.rows, 1, self.factor)
            place, steps = place // factor, place % factor
        return jnp.where((place >= 0) & (place < self.rows), place, -1), steps


class PositionTableModule(nnx.Module):
    def __init__(self, spec: PositionTable, width: int, rngs: nnx.Rngs):
        self.spec = spec
        self.table = weight(rngs, (spec.rows, width), (None, "width"), fan_in=width)
        if spec.between == "learned":
            shape = (spec.rows * (spec.factor - 1), width)
            self.between = nnx.Param(jnp.zeros(shape, jnp.float32), axes=(None, "width"), added=True)

    def __call__(self, info: TokenInfo) -> Float[Array, "B T M"]:
        """What is added to each token. Behind the last old row an interpolated table ends level."""
        positions = jnp.asarray(info.positions)[..., 0]
        lengths = lengths_of(info) if self.spec.reads_lengths else jnp.zeros(info.shape, jnp.int32)
        place, steps = self.spec.places(positions, lengths)
        low, table, factor = jnp.maximum(place, 0), self.table[...], self.spec.factor
        share = (steps / factor)[..., None]
        read = table[low] * (1 - share) + table[jnp.minimum(low + 1, self.spec.rows - 1)] * share
        if self.spec.between == "learned":
            added = self.between[...][low * (factor - 1) + jnp.maximum(steps - 1, 0)]
            read += jnp.where((steps > 0)[..., None], added, 0.0)
        return jnp.where((place < 0)[..., None], jnp.nan, read)
