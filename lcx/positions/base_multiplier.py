"""A multiple of the rotary base: adjusted base frequency (Xiong et al. 2023), LongLLaDA (2025), LongEmbed (2024).

Unlike NTK-aware scaling the base is multiplied by the number itself, without the exponent r / (r - 2).
"""

import dataclasses
import math
from typing import Literal

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseMultiplier(FrequencyRule):
    """theta_c of base * multiplier. `auto` takes LongLLaDA's for `original_length`, the trained window, and `target_length`:
    the least whole multiple with which no channel that turned in full while training makes less than a turn in the target."""

    multiplier: float | Literal["auto"]
    original_length: int | None = None
    target_length: int | None = None

    def validate(self):
        super().validate()
        if self.multiplier == "auto":
            for field in ("original_length", "target_length"):
                self.check((getattr(self, field) or 0) >= 7, field, "at least 7 tokens where multiplier is 'auto'")
            self.check(self.target_length >= self.original_length, "target_length", f"at least {self.original_length}")
        else:
            self.check(self.multiplier >= 1, "multiplier", "at least 1 or 'auto'")
            for field in ("original_length", "target_length"):
                self.check(getattr(self, field) is None, field, "None: only the multiplier 'auto' reads it")

    def inverse_frequencies(self, rotary_dim, length):
        return geometric(self.base * self.resolved(rotary_dim), rotary_dim)

    def resolved(self, rotary_dim: int) -> float:
        """The multiplier for so many rotated channels."""
        if self.multiplier != "auto":
            return float(self.multiplier)
        wanted = (self.target_length / (2 * math.pi)) ** (rotary_dim / critical_dimension(self, rotary_dim))
        return float(max(1, math.ceil(wanted / self.base)))

    @classmethod
    def examples(cls):
        return (cls(multiplier=3.0), cls(multiplier="auto", original_length=64, target_length=256))


def critical_dimension(rule: FrequencyRule, rotary_dim: int) -> int:
    """How many of the rotated channels turn in full within the trained window, rounded up to pairs (Liu et al. 2023)."""
    turning = rotary_dim / 2 * math.log(rule.original_length / (2 * math.pi), rule.base)
    return min(2 * math.ceil(turning), rotary_dim)
