"""The pipeline: rows of one or several kinds, mixed, shuffled, batched and dealt to hosts, through Grain.

The order is a pure function of the seed and the global step. Host h of n reads its own rows of every global batch, so the
global batches do not depend on how many hosts there are. The iterator's state is small and restores exactly.
"""

import dataclasses
import functools
from collections.abc import Sequence

import grain
from grain import MapDataset, ReadOptions

from lcx.data.rows import Rows, RowSet, collate, positioned, positioned_alike
from lcx.data.tokenizers import ByteTokenizer, Tokenizer
from lcx.positions.position_rule import PositionRule
from lcx.spec import Spec

ENDLESS = 1 << 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Spec):
    """A kind of rows and its share of the mixture, relative to the others."""

    rows: Rows
    weight: float = 1.0

    def validate(self):
        self.check(self.weight > 0, "weight", "a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline(Spec):
    """length: tokens a row. batch_size: rows of a global batch, over all hosts. seed: of document order, shuffle, recall and
    positions. positions: the rule that gives documents theirs, anew whenever a row comes; None is the index."""

    mixture: tuple[Weighted, ...]
    length: int
    batch_size: int
    tokenizer: Tokenizer = ByteTokenizer()
    seed: int = 0
    positions: PositionRule | None = None

    def validate(self):
        for field in ("length", "batch_size"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(len(self.mixture) >= 1, "mixture", "at least one kind of rows")
        self.check(self.seed >= 0, "seed", "0 or a positive number")

    @property
    def spread(self) -> int:
        """Any two tokens of a document stand less than so many positions apart: `length`, or more where places are skipped."""
        if self.positions is not None:
            return self.positions.spread(self.length)
        return max(kind.rows.spread(self.length) for kind in self.mixture)

    @property
    def position_axes(self) -> int:
        """Of its batches: the most that a kind of rows has."""
        return max(kind.rows.position_axes or 1 for kind in self.mixture)

    def row_sets(self) -> list[RowSet]:
        """The rows of every kind, tokenised and planned."""
        sets = [kind.rows.rows(self.tokenizer, self.length, self.seed + n) for n, kind in enumerate(self.mixture)]
        for n, rows in enumerate(sets):
            if not len(rows):
                self.fail(f"mixture[{n}].rows", self.mixture[n].rows, f"enough text for one row of length = {self.length}")
        return sets

    def dataset(self, *, host: int = 0, hosts: int = 1, sets: Sequence[RowSet] | None = None) -> grain.IterDataset:
        """Endless batches (lcx.batch.Batch of NumPy arrays) of this host's rows. sets: `row_sets()`, where they are at hand.

        Raises ValueError unless the hosts divide the batch.
        """
        if not 0 <= host < hosts or self.batch_size % hosts:
            raise ValueError(f"pipeline: host {host} of {hosts} cannot take its share of batch_size = {self.batch_size}")
        sets = self.row_sets() if sets is None else sets
        kinds = [MapDataset.source(rows).seed(self.seed + n).shuffle().repeat() for n, rows in enumerate(sets)]
        rule = self.positions
        if rule is not None and rule.shared == "document":
            kinds = [kind.random_map(functools.partial(positioned, rule=rule)) for kind in kinds]
        mixed = kinds[0] if len(kinds) == 1 else MapDataset.mix(kinds, [kind.weight for kind in self.mixture])
        if rule is not None and rule.shared == "batch":
            alike = functools.partial(positioned_alike, rule=rule, batch_size=self.batch_size, seed=self.seed)
            mixed = mixed.map_with_index(alike)
        share = self.batch_size // hosts
        dealt = MapDataset.source(_HostRows(mixed, self.batch_size, share, host * share))
        batched = functools.partial(collate, axes=self.position_axes)
        return dealt.batch(share, batch_fn=batched).to_iter_dataset(ReadOptions(num_threads=1, prefetch_buffer_size=4))

    def counts(self, sets: Sequence[RowSet] | None = None) -> dict[str, int]:
        """Tokens kept, split, padded and dropped in one pass over each packed kind, and in a sample of an endless one, named by
        its place in the mixture. sets: as in `dataset`."""
        sets = enumerate(self.row_sets() if sets is None else sets)
        return {f"mixture[{n}].{name}": value for n, rows in sets for name, value in rows.counts().items()}


@dataclasses.dataclass(frozen=True)
class _HostRows:
    """The rows of one host, in order: its slice of every global batch."""

    rows: MapDataset
    batch_size: int
    share: int
    first: int

    def __len__(self) -> int:
        return ENDLESS // self.batch_size * self.share

    def __getitem__(self, i: int):
        return self.rows[i // self.share * self.batch_size + self.first + i % self.share]
