"""Packing: documents to rows of a fixed length, document-aware.

Every document ends in the tokenizer's end token. A token's target is the token after it in its document, so the last token
has weight 0; where a document is cut at the end of a row, the row's last token still has the next row's first token as its
target: no token of a document goes unpredicted but its first. Each piece of a document is a segment of its own in its row,
its index starts at 0.
"""

import abc
import bisect
import dataclasses
import itertools

import numpy as np

from lcx.data.rows import Row, Rows, RowSet
from lcx.data.sources import Documents, Source
from lcx.data.tokenizers import Tokenizer
from lcx.spec import Spec

Piece = tuple[int, int]  # start and end in the concatenated documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing(Spec, abc.ABC):
    """Base of every packing: which pieces of the documents share a row."""

    @abc.abstractmethod
    def plan(self, lengths: np.ndarray, length: int, most: int | None = None) -> list[list[Piece]]:
        """The pieces of every row, at most so many of them, given each document's token count (end token included)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcatAndSplit(Packing):
    """All documents in a line, cut every `length` tokens. Only the last row is padded, and those that have their most documents
    before."""

    def plan(self, lengths, length, most=None):
        ends = np.cumsum(lengths)
        rows: list[list[Piece]] = []
        start = 0
        while start < int(ends[-1]):
            stop = min(start + length, int(ends[-1]))
            first, last = np.searchsorted(ends, [start, stop - 1], side="right")
            cuts = [start, *(int(end) for end in ends[first:last]), stop]
            pieces = [(a, b) for a, b in itertools.pairwise(cuts) if a < b][:most]
            rows.append(pieces)
            start = pieces[-1][1]
        return rows

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFit(Packing):
    """Fewer Truncations (Ding et al. 2024): only documents longer than a row are cut; pieces go, longest first, into the row
    with the least room that still holds them. Rows are padded."""

    def plan(self, lengths, length, most=None):
        ends = np.cumsum(lengths)
        begins = (ends - lengths).tolist()
        pieces = [(a, min(a + length, e)) for b, e in zip(begins, ends.tolist(), strict=True) for a in range(b, e, length)]
        pieces.sort(key=lambda piece: piece[0] - piece[1])
        rows: list[list[Piece]] = []
        by_room: dict[int, list[int]] = {}
        rooms: list[int] = []  # rooms with an open row, ascending
        for a, b in pieces:
            place = bisect.bisect_left(rooms, b - a)
            if place == len(rooms):
                row, room = len(rows), length
                rows.append([])
            else:
                room = rooms[place]
                row = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[place]
            rows[row].append((a, b))
            left = room - (b - a)
            if left and (most is None or len(rows[row]) < most):
                if left not in by_room:
                    bisect.insort(rooms, left)
                by_room.setdefault(left, []).append(row)
        return rows

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedText(Rows):
    """Rows of packed documents of a source, the documents in an order drawn from the pipeline's seed.

    Every epoch reads the same rows; the pipeline shuffles them anew. most: documents of a row; None is as many as fit.
    """

    source: Source
    packing: Packing = ConcatAndSplit()
    most: int | None = None

    def validate(self):
        self.check(self.most is None or self.most >= 1, "most", "at least 1 document, or None")

    def documents(self, length):
        return length if self.most is None else min(self.most, length)

    def rows(self, tokenizer, length, seed):
        documents = self.source.documents()
        order = np.random.default_rng(seed).permutation(len(documents))
        return PackedRows(documents, order, tokenizer, self.packing, length, self.documents(length))


class PackedRows(RowSet):
    """All documents tokenised once, in the smallest integer type, and the plan of their rows."""

    def __init__(
        self,
        documents: Documents,
        order: np.ndarray,
        tokenizer: Tokenizer,
        packing: Packing,
        length: int,
        most: int | None = None,
    ):
        small = np.uint16 if tokenizer.size <= 1 << 16 else np.int32
        encoded = [np.append(tokenizer.encode(documents[i]), tokenizer.eos).astype(small) for i in order]
        lengths = np.asarray([len(ids) for ids in encoded])
        self._stream, self._ends = np.concatenate(encoded), np.cumsum(lengths)
        self._plan = packing.plan(lengths, length, most)
        self._length, self._pad = length, tokenizer.pad

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, i: int) -> Row:
        tokens = np.full(self._length, self._pad, np.int32)
        targets, segments = tokens.copy(), np.zeros(self._length, np.int32)
        weights = np.zeros(self._length, np.float32)
        at = 0
        for number, (start, stop) in enumerate(self._plan[i], start=1):
            here = slice(at, at + stop - start)
            tokens[here], segments[here], weights[here] = self._stream[start:stop], number, 1
            following = self._stream[start + 1 : stop + 1]
            targets[at : at + len(following)] = following
            if stop == self._ends[np.searchsorted(self._ends, start, side="right")]:
                targets[here.stop - 1], weights[here.stop - 1] = self._pad, 0
            at = here.stop
        return Row(tokens, targets, weights, segments)

    def counts(self) -> dict[str, int]:
        pieces = [piece for row in self._plan for piece in row]
        begins = np.searchsorted(self._ends, [start for start, _ in pieces], side="right")
        split = np.bincount(begins, minlength=len(self._ends)) > 1
        kept = sum(stop - start for start, stop in pieces)
        lengths = np.diff(self._ends, prepend=0)
        return {
            "documents": len(self._ends),
            "documents_split": int(split.sum()),
            "tokens": int(self._ends[-1]),
            "tokens_split": int(lengths[split].sum()),
            "tokens_dropped": int(self._ends[-1]) - kept,
            "tokens_padded": len(self._plan) * self._length - kept,
        }
