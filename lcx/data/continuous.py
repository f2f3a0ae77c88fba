"""Rows whose documents are counted through: positions go on where the document before ended, whatever tokens see.

AnchorAttention (Wang et al. 2024, When Precision Meets Position): one token in front of the row, at position 0, is seen by all
documents, which do not see each other. Rounded to bfloat16, attention to a first token differs from place to place; here all
documents share one. The other two ways are its baselines; a third is rows as they come, which count each document anew.
"""

import dataclasses
from typing import Literal

import numpy as np

from lcx.batch import SHARED
from lcx.data.rows import Row, Rows, RowSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuous(Rows):
    """Rows of another kind. sees: a token's `own document`, the `whole row` (full attention over packed documents), or its own
    document and an `anchor`, the tokenizer's bos, which takes the row's first place."""

    rows_of: Rows
    sees: Literal["own document", "whole row", "anchor"] = "anchor"

    def check_fit(self, tokenizer, length):
        self.check(self.rows_of.position_axes is None, "rows_of", "rows whose positions are the index")
        self.check(
            self.sees != "anchor" or hasattr(tokenizer, "bos"), "sees", "another than 'anchor': the tokenizer has no bos"
        )
        self.rows_of.check_fit(tokenizer, length - self._anchors)

    @property
    def position_axes(self):
        return 1

    def documents(self, length):
        return 1 if self.sees == "whole row" else self.rows_of.documents(length - self._anchors)

    @property
    def shares(self):
        return self.sees == "anchor"

    def rows(self, tokenizer, length, seed):
        self.check_fit(tokenizer, length)
        rows = self.rows_of.rows(tokenizer, length - self._anchors, seed)
        return ContinuousRows(rows, self.sees, getattr(tokenizer, "bos", None))

    @property
    def _anchors(self) -> int:
        return int(self.sees == "anchor")


class ContinuousRows(RowSet):
    def __init__(self, rows: RowSet, sees: str, bos: int | None):
        self._rows, self._sees, self._bos = rows, sees, bos

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Row:
        row = self._rows[i]
        if self._sees == "anchor":
            front = (self._bos, row.tokens[0], 0, SHARED)
            tokens, targets, weights, segments = (
                np.concatenate([np.asarray([first], field.dtype), field]) for first, field in zip(front, row[:4], strict=True)
            )
            row = Row(tokens, targets, weights, segments)
        real = row.segments != 0
        positions = np.where(real, np.cumsum(real) - 1, 0).astype(np.float32)
        if self._sees == "whole row":
            row = row._replace(segments=real.astype(np.int32))
        return row._replace(positions=positions[:, None])

    def counts(self) -> dict[str, int]:
        return self._rows.counts()
