"""M-RoPE++ (GIRAFFE, Li et al. 2025): an extension of M-RoPE that keeps time, interpolates columns and blends over rows."""

import dataclasses
from typing import Literal

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class MRopePlusPlus(FrequencyRule):
    """factor: extension of `original_length`, the visual window. Three sections: time, rows, columns.

    form `paper`: columns are slowed by `factor`, rows from nothing at their fast end to `factor` at the slow one, linearly in
    frequency. form `code`, as released: rows and columns have the frequencies of NTK scaling by (L' - 1) / (L - 1).
    """

    factor: float
    original_length: int
    sections: tuple[int, ...] = (16, 24, 24)
    form: Literal["paper", "code"] = "paper"

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.original_length >= 2, "original_length", "at least 2 tokens")
        self.check(len(self.sections) == 3, "sections", "three: time, rows, columns")
        self.check(self.section_order == "contiguous", "section_order", "'contiguous'")

    def inverse_frequencies(self, rotary_dim, length):
        theta, axis = geometric(self.base, rotary_dim), self.axes(rotary_dim // 2)
        if self.form == "code":
            self.check(rotary_dim > 2, "rotary", f"more than the {rotary_dim} rotated channels: the exponent is r / (r - 2)")
            extended = round(self.factor * self.original_length)
            scale = (extended - 1) / (self.original_length - 1)
            return np.where(axis == 0, theta, geometric(self.base * scale ** (rotary_dim / (rotary_dim - 2)), rotary_dim))
        rows = np.flatnonzero(axis == 1)
        start, end = theta[rows[0]], theta[rows[-1] + 1]
        blend = 1 / self.factor + (1 - 1 / self.factor) * (theta - end) / (start - end)
        return theta * np.select([axis == 0, axis == 1], [1.0, blend], 1 / self.factor)

    @classmethod
    def examples(cls):
        shared = {"factor": 4.0, "original_length": 64, "sections": (1, 2, 1)}
        return (cls(**shared), cls(**shared, form="code"))
