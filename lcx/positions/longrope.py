"""LongRoPE (Ding et al. 2024): a searched factor for every channel, one list within the trained window, one beyond it."""

import dataclasses
import math
from typing import ClassVar

import numpy as np

from lcx.positions.frequencies import geometric
from lcx.positions.length_rule import LengthRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRoPE(LengthRule):
    """theta_c / short[c] in documents of at most L = `original_length` tokens, theta_c / long[c] in longer ones.

    factor: extension that the long list is for. Cosine and sine are multiplied by sqrt(1 + ln factor / ln L), at every length,
    or by `temperature`.

    kept_positions: so many of the first positions of every document are turned as by RoPE, without the factor, at every length
    (the paper's n-hat; `MixedLongRoPE` of the authors' code). Logits of a kept and another token depend on where they stand.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    factor: float
    temperature: float | None = None
    kept_positions: int = 0

    rows: ClassVar[int | None] = 2

    def validate(self):
        super().validate()
        self.check(self.original_length >= 2, "original_length", "at least 2 tokens")
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.temperature is None or self.temperature > 0, "temperature", "a positive number or None")
        self.check(self.kept_positions >= 0, "kept_positions", "at least 0")
        one = not self.kept_positions or not self.sections
        self.check(one, "kept_positions", "0 beside sections: which positions come first is defined on one axis")
        for field in ("short", "long"):
            self.check(all(value > 0 for value in getattr(self, field)), field, "positive factors")

    @property
    def spacing(self):
        return 1

    def inverse_frequencies(self, rotary_dim, length):
        for field in ("short", "long"):
            self.check(len(getattr(self, field)) == rotary_dim // 2, field, f"{rotary_dim // 2} factors, one a rotated pair")
        return geometric(self.base, rotary_dim) / np.asarray(self.long if length > self.original_length else self.short)

    def frequencies(self, head_dim, length):
        found = super().frequencies(head_dim, length)
        if not self.kept_positions:
            return found
        original = geometric(self.base, self.rotated(head_dim))
        rows = {"inv_freq": np.vstack([found.inv_freq, original]), "factor": np.append(found.factor, 1.0)}
        return dataclasses.replace(found, kept=self.kept_positions, **rows)

    def attention_factor(self, length):
        if self.temperature is not None:
            return self.temperature
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    @classmethod
    def examples(cls):
        shared = {"original_length": 8, "short": (1.0, 1.0, 1.0, 1.0), "long": (1.0, 1.5, 2.0, 4.0), "factor": 4.0}
        return (cls(**shared), cls(kept_positions=3, **shared))


def rescaled(factors: tuple[float, ...], old: float, new: float) -> tuple[float, ...]:
    """Factors searched for an extension of `old`, for one of `new`: 1 + (factor - 1) (new - 1) / (old - 1)."""
    return tuple(1 + (factor - 1) * (new - 1) / (old - 1) for factor in factors)
