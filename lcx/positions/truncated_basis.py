"""Truncated basis (Giraffe, Pal et al. 2023, section 3.3): slow channels share one slow frequency, the slowest stand still."""

import dataclasses
import math

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedBasis(FrequencyRule):
    """With f the frequency of one turn in `original_length`: channels of f or more keep theirs, those below f / `still` get 0,
    those between f / `slow`. For fine-tuning: without it, already the trained window suffers."""

    original_length: int
    slow: float = 16.0
    still: float = 8.0

    def validate(self):
        super().validate()
        self.check(self.original_length >= 1, "original_length", "at least 1 token")
        self.check(self.still >= 1, "still", "at least 1")
        self.check(self.slow >= 1, "slow", "at least 1")

    def inverse_frequencies(self, rotary_dim, length):
        theta, cut = geometric(self.base, rotary_dim), 2 * math.pi / self.original_length
        return np.where(theta >= cut, theta, np.where(theta >= cut / self.still, cut / self.slow, 0.0))

    @classmethod
    def examples(cls):
        return (cls(original_length=256), cls(original_length=64, slow=4.0, still=2.0))
