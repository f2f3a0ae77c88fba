"""Learned positions: a row of a table for each place of a document, added to its tokens' embeddings (BERT, GPT-2).

LongEmbed (Zhu et al. 2024) reads documents longer than the table without training, by what a place p of n tokens reads:
    grouped      row p // ceil(n / rows)
    recurrent    row p mod rows
    interpolated row p of a table `factor` times as long, whose rows between two old ones are interpolated; documents that fit
                 the old table read every `factor`-th row, which are the old ones
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
    interpolated table."""

    rows: int
    reading: Reading = "plain"
    factor: int = 1

    def validate(self):
        self.check(self.rows >= 1, "rows", "at least 1")
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.factor == 1 or self.reading == "interpolated", "factor", "1 where reading is not 'interpolated'")

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

    def places(self, index: Int[Array, "B T"], lengths: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """The row of each token, fractions between two; -1 where the table has none."""
        if self.reading == "grouped":
            return (index // jnp.maximum(1, -(-lengths // self.rows))).astype(jnp.float32)
        if self.reading == "recurrent":
            return (index % self.rows).astype(jnp.float32)
        step = jnp.where(lengths <= self.rows, 1.0, 1 / self.factor) if self.reading == "interpolated" else 1.0
        return jnp.where(index < self.rows * self.factor, index * step, -1.0)


class PositionTableModule(nnx.Module):
    def __init__(self, spec: PositionTable, width: int, rngs: nnx.Rngs):
        self.spec = spec
        self.table = weight(rngs, (spec.rows, width), (None, "width"), fan_in=width)

    def __call__(self, info: TokenInfo) -> Float[Array, "B T M"]:
        """What is added to each token. Behind the last old row an interpolated table ends level."""
        index = jnp.asarray(info.index)
        place = self.spec.places(index, lengths_of(info) if self.spec.reads_lengths else index)
        low = jnp.clip(jnp.floor(place), 0, self.spec.rows - 1).astype(jnp.int32)
        high = jnp.minimum(low + 1, self.spec.rows - 1)
        share = (place - low)[..., None]
        table = self.table[...]
        read = table[low] * (1 - share) + table[high] * share
        return jnp.where((place < 0)[..., None], jnp.nan, read)
