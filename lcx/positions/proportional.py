"""Proportional RoPE (Gemma 3n, 2025): a share of the head's pairs turns, with the frequencies that it has in the whole head."""

import dataclasses

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(FrequencyRule):
    """ratio: the share of pairs that turns, the fastest ones; the others stand still. factor: slows those that turn.

    Unlike `rotary`, which makes a smaller head of the first channels, pairs and frequencies are those of the whole head.
    """

    ratio: float
    factor: float = 1.0

    def validate(self):
        super().validate()
        self.check(0 < self.ratio <= 1, "ratio", "a share in (0, 1]")
        self.check(self.rotary == 1, "rotary", "1, as ratio says which share of the head turns")
        self.check(self.factor >= 1, "factor", "at least 1")

    def inverse_frequencies(self, rotary_dim, length):
        turning = int(self.ratio * rotary_dim // 2)
        self.check(turning >= 1, "ratio", f"a share that is at least one of {rotary_dim // 2} pairs")
        theta = geometric(self.base, rotary_dim) / self.factor
        return np.where(np.arange(rotary_dim // 2) < turning, theta, 0.0)

    @classmethod
    def examples(cls):
        return (cls(ratio=0.5), cls(ratio=0.75, factor=2.0))
