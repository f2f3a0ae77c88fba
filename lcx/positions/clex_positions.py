"""The positions that CLEX (Chen et al. 2024) is trained with: a document is spread over t times its length, t drawn anew."""

import dataclasses

import numpy as np

from lcx.positions.position_rule import PositionRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLEXPositions(PositionRule):
    """For n tokens, t from 1 to `largest`: 0, then n - 2 places drawn from 1 to n t - 2 in order, then n t - 1, so that with
    t = 1 they are the index. A document of k windows of `original_length` is drawn together by k; fractions are kept, but for
    its last place. The rope is told that the document has t windows. As published the draw is the batch's."""

    original_length: int
    largest: int = 16

    def validate(self):
        super().validate()
        self.check(self.original_length >= 1, "original_length", "at least 1 token")
        self.check(self.largest >= 1, "largest", "at least 1")

    @property
    def reach(self):
        return 2 * self.largest * self.original_length

    def spread(self, length):
        return self.largest * min(length, 2 * self.original_length - 1)

    def step(self, length):
        return 1 / max(1, length // self.original_length)

    @property
    def tells_length(self):
        return True

    def placed(self, length, rng):
        t = int(rng.integers(1, self.largest, endpoint=True))
        together = max(1, length // self.original_length)
        inner = 1 + np.sort(rng.choice(length * t - 2, length - 2, replace=False)) if length > 2 else np.zeros(0)
        ends = [0] if length == 1 else [0, length * t // together - 1]
        positions = np.concatenate([ends[:1], inner / together, ends[1:]])
        return np.maximum.accumulate(positions).astype(np.float32), t * self.original_length

    def positions(self, length, rng):
        return self.placed(length, rng)[0]

    @classmethod
    def examples(cls):
        return (cls(original_length=8, largest=4),)
