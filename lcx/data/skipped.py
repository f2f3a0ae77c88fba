"""Rows in which text is skipped, as PoSE (Zhu et al. 2024) trains: two parts of a longer text, positions skipped as well.

Of a text of n tokens a row of T takes the first r, r from 1 to ceil(T / 2), and the T - r that end at a place from T to n.
The first part stands at its index, the second a random number of places behind it, such that the last is below `target`.
"""

import dataclasses
import math

import numpy as np

from lcx.data.rows import Row, Rows, RowSet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped(Rows):
    """rows_of: whose rows, `times` as long, are the texts, all of their documents as one. target: the window to train for.
    seam: whether the last token of the first part has to predict the first of the second, as in the released code."""

    rows_of: Rows
    target: int
    times: int = 5
    seam: bool = True

    def validate(self):
        self.check(self.target >= 1, "target", "at least 1 token")
        self.check(self.times >= 1, "times", "at least 1")

    def check_fit(self, tokenizer, length):
        self.check(self.rows_of.position_axes is None, "rows_of", "rows whose positions are the index")
        self.check(self.target >= length, "target", f"at least the {length} tokens of a row")
        self.rows_of.check_fit(tokenizer, self.times * length)

    def spread(self, length):
        return max(length, self.target)

    @property
    def position_axes(self):
        return 1

    def documents(self, length):
        return 1

    def rows(self, tokenizer, length, seed):
        self.check_fit(tokenizer, length)
        return SkippedRows(self, self.rows_of.rows(tokenizer, self.times * length, seed), length, seed)


class SkippedRows(RowSet):
    def __init__(self, spec: Skipped, texts: RowSet, length: int, seed: int):
        self._spec, self._texts, self._length, self._seed = spec, texts, length, seed

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, i: int) -> Row:
        text, T = self._texts[i], self._length
        real = np.flatnonzero(text.segments != 0)
        rng = np.random.default_rng((self._seed, i))
        size = min(T, len(real))
        first = int(rng.integers(1, max(1, math.ceil(size / 2)), endpoint=True))
        end = int(rng.integers(size, len(real), endpoint=True))
        skip = int(rng.integers(0, self._spec.target - size, endpoint=True))
        taken = real[np.concatenate([np.arange(first), np.arange(end - (size - first), end)])]
        pad = lambda x: np.concatenate([x, np.zeros(T - size, x.dtype)])
        targets, weights = text.targets[taken].copy(), text.weights[taken].copy()
        if first < size:
            targets[first - 1] = text.tokens[taken[first]]
            weights[first - 1] = float(self._spec.seam)
        places = np.arange(size) + np.where(np.arange(size) < first, 0, skip)
        return Row(
            tokens=pad(text.tokens[taken]),
            targets=pad(targets),
            weights=pad(weights),
            segments=pad(np.ones(size, np.int32)),
            positions=pad(places.astype(np.float32))[:, None],
        )

    def counts(self) -> dict[str, int]:
        """Those of the texts, of which a row takes a part."""
        return self._texts.counts() | {"tokens_skipped": max(0, self._spec.times - 1) * self._length * len(self._texts)}
