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

    def places(self, positions: Float[Array, "B T"], lengths: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """The row of each token, fractions between two; -1 where the table has none."""
        if self.reading == "grouped":
            return positions // jnp.maximum(1, -(-lengths // self.rows))
        if self.reading == "recurrent":
            return positions % self.rows
        step = jnp.where(lengths <= self.rows, 1.0, 1 / self.factor) if self.reading == "interpolated" else 1.0
        return jnp.where((positions >= 0) & (positions < self.rows * self.factor), positions * step, -1.0)


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
        place = self.spec.places(positions, lengths_of(info) if self.spec.reads_lengths else jnp.zeros(info.shape, jnp.int32))
        low = jnp.clip(jnp.floor(place), 0, self.spec.rows - 1).astype(jnp.int32)
        high = jnp.minimum(low + 1, self.spec.rows - 1)
        share = (place - low)[..., None]
        table = self.table[...]
        read = table[low] * (1 - share) + table[high] * share
        if self.spec.between == "learned":
            factor = self.spec.factor
            step = jnp.round(share[..., 0] * factor).astype(jnp.int32)
            read += jnp.where(share > 0, self.between[...][low * (factor - 1) + jnp.maximum(step - 1, 0)], 0.0)
        return jnp.where((place < 0)[..., None], jnp.nan, read)
