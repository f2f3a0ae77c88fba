"""Llama 3.1's frequency scaling (Meta 2024): the `rotations` ramp of YaRN between 1 and 4 turns, without a temperature."""

import dataclasses
import math

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(FrequencyRule):
    """Channels that make more than `high` turns in `original_length`, the trained window, are kept, those that make fewer than
    `low` are slowed by `factor`, those between are blended by their turns. `low` may equal `high`."""

    factor: float = 8.0
    original_length: int = 8192
    low: float = 1.0
    high: float = 4.0
    base: float = 500_000.0

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.original_length >= 1, "original_length", "at least 1 token")
        self.check(self.low > 0, "low", "a positive number of turns")
        self.check(self.high >= self.low, "high", f"at least low = {self.low}")

    def inverse_frequencies(self, rotary_dim, length):
        theta = geometric(self.base, rotary_dim)
        turns = self.original_length * theta / (2 * math.pi)
        between = np.clip((turns - self.low) / (self.high - self.low), 0, 1) if self.high > self.low else turns >= self.low
        return theta * between + theta / self.factor * (1 - between)

    @classmethod
    def examples(cls):
        return (cls(), cls(factor=4.0, original_length=64, low=1.0, high=1.0, base=10_000.0))
