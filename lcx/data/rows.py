"""Rows: what a data set is made of before batching. One row is T tokens, their targets, weights and segments."""

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from lcx.batch import Batch, TokenInfo, document_index
from lcx.data.tokenizers import Tokenizer
from lcx.positions.position_rule import PositionRule
from lcx.spec import Spec


class Row(NamedTuple):
    """One row of T tokens. targets[t] is the token to predict at t; weights[t] is 0 where nothing is to be predicted.

    positions: what the rotation reads, a column an axis; None is the index. lengths: what a length-dependent rope takes each
    token's document for; None is its own.
    """

    tokens: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "T"]
    weights: Float[np.ndarray, "T"]
    segments: Int[np.ndarray, "T"]
    positions: Float[np.ndarray, "T P"] | None = None
    lengths: Int[np.ndarray, "T"] | None = None


class RowSet(abc.ABC):
    """Rows with random access: `rows[i]` is a pure function of i."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, i: int) -> Row: ...

    def counts(self) -> dict[str, int]:
        """What happened to the tokens of the source: kept, padded, dropped; documents split."""
        return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows(Spec, abc.ABC):
    """Base of everything that gives rows: packed text, synthetic recall."""

    def check_fit(self, tokenizer: Tokenizer, length: int) -> None:
        """Raises ValueError (SpecError, TaskDoesNotFit) if rows of `length` tokens cannot be made, before any is."""

    @property
    def shares(self) -> bool:
        """Whether all documents of a row see one of its tokens."""
        return False

    def spread(self, length: int) -> int:
        """Any two tokens of a document in rows of `length` tokens stand less than so many positions apart."""
        return length

    def documents(self, length: int) -> int:
        """The most that a row of `length` tokens holds."""
        return length

    @abc.abstractmethod
    def rows(self, tokenizer: Tokenizer, length: int, seed: int) -> RowSet:
        """The rows of `length` tokens."""

    @property
    def position_axes(self) -> int | None:
        """Of rows that have positions of their own; None where these are the index."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined(Rows):
    """`parts` short rows of another kind side by side in one, each a document of its own: short tasks in long rows."""

    rows_of: Rows
    parts: int

    def validate(self):
        self.check(self.parts >= 1, "parts", "at least 1")

    def check_fit(self, tokenizer, length):
        self.check(length % self.parts == 0, "parts", f"a divisor of length = {length}")
        self.check(
            not self.rows_of.shares, "rows_of", "rows without a token that all documents see, which would be one of several"
        )
        self.rows_of.check_fit(tokenizer, length // self.parts)

    @property
    def position_axes(self):
        return self.rows_of.position_axes

    def spread(self, length):
        return self.rows_of.spread(length // self.parts)

    def documents(self, length):
        return self.parts * self.rows_of.documents(length // self.parts)

    def rows(self, tokenizer, length, seed):
        self.check_fit(tokenizer, length)
        return JoinedRows(self.rows_of.rows(tokenizer, length // self.parts, seed), self.parts)


class JoinedRows(RowSet):
    def __init__(self, short: RowSet, parts: int):
        self._short, self._parts = short, parts

    def __len__(self) -> int:
        return len(self._short) // self._parts

    def __getitem__(self, i: int) -> Row:
        rows = [self._short[i * self._parts + n] for n in range(self._parts)]
        tokens, targets, weights = (np.concatenate([row[field] for row in rows]) for field in range(3))
        places = itertools.accumulate([0, *(int(row.segments.max()) for row in rows[:-1])])
        segments = [np.where(row.segments > 0, row.segments + first, 0) for row, first in zip(rows, places, strict=True)]
        given = [row.positions for row in rows if row.positions is not None]
        if given and len(given) < len(rows):
            raise ValueError(
                f"Joined: {len(given)} of {len(rows)} short rows have positions of their own: expected all or none"
            )
        positions = np.concatenate(given) if given else None
        return Row(tokens, targets, weights, np.concatenate(segments).astype(np.int32), positions)

    def counts(self) -> dict[str, int]:
        """Those of the short rows, less the ones that fill no whole row, which are dropped; a sample stays what it is."""
        left = len(self._short) % self._parts
        counts = self._short.counts() | {"rows_left_over": left}
        if not left or "rows_sampled" in counts:
            return counts
        segments = np.stack([self._short[i].segments for i in range(len(self._short) - left, len(self._short))])
        dropped, padded = int((segments > 0).sum()), int((segments == 0).sum())
        taken = {"tokens_dropped": counts["tokens_dropped"] + dropped, "tokens_padded": counts["tokens_padded"] - padded}
        return counts | taken


def positioned(row: Row, rng: np.random.Generator, *, rule: PositionRule) -> Row:
    """The row with positions of each of its documents by the rule; padding stays at 0."""
    return _positioned(row, rule, lambda: rng)


def positioned_alike(index: int, row: Row, *, rule: PositionRule, batch_size: int, seed: int) -> Row:
    """The same for row `index` of all, whose documents draw the numbers that all of its batch draw."""
    return _positioned(row, rule, lambda: np.random.default_rng((seed, index // batch_size)))


def _positioned(row: Row, rule: PositionRule, generator: Callable[[], np.random.Generator]) -> Row:
    positions, lengths = np.zeros((*row.segments.shape, 1), np.float32), np.zeros(row.segments.shape, np.int32)
    for segment in dict.fromkeys(row.segments[row.segments > 0].tolist()):
        places = np.flatnonzero(row.segments == segment)
        positions[places, 0], length = rule.placed(len(places), generator())
        lengths[places] = length or 0
    return row._replace(positions=positions, lengths=lengths if lengths.any() else None)


def collate(rows: Sequence[Row], *, axes: int = 1) -> Batch:
    """A batch of NumPy arrays. Index and order, and positions where rows have none, restart in every segment of a row.

    Rows of one axis beside those of more stand at the same place of each of the `axes`, as text does beside video.
    """
    tokens, targets, weights, segments = (np.stack([row[field] for row in rows]) for field in range(4))
    index = document_index(segments)
    given = [own[:, None] if row.positions is None else row.positions for row, own in zip(rows, index, strict=True)]
    positions = np.stack([np.broadcast_to(row, (len(row), axes)) for row in given]).astype(np.float32)
    told = [row.lengths for row in rows]
    lengths = np.stack([np.zeros_like(own) if row is None else row for row, own in zip(told, index, strict=True)])
    info = TokenInfo(
        index=index,
        order=index,
        positions=positions,
        segments=segments,
        lengths=None if all(row is None for row in told) else lengths,
    )
    return Batch(tokens=tokens, info=info, targets=targets, loss_weights=weights)
