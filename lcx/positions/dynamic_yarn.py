"""Dynamic YaRN (Peng et al. 2023, section 3.3): YaRN with the factor that the length in use needs, temperature included."""

import dataclasses
from typing import Literal

from lcx.positions.length_rule import LengthRule
from lcx.positions.yarn import YaRN


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicYaRN(LengthRule):
    """YaRN of factor n / L for documents of n > L = `original_length` tokens, RoPE for shorter ones. Other fields are YaRN's.

    step: lengths are rounded up to as many tokens beyond L.
    """

    fast: float = 32.0
    slow: float = 1.0
    ramp: Literal["index", "rotations", "harmonic"] = "index"
    truncate: bool = True
    temperature: Literal["yarn", "none"] = "yarn"
    step: int = 1

    def validate(self):
        super().validate()
        self.check(self.step >= 1, "step", "at least 1 token")
        self._yarn(self.original_length)

    @property
    def spacing(self):
        return self.step

    def inverse_frequencies(self, rotary_dim, length):
        return self._yarn(length).inverse_frequencies(rotary_dim, length)

    def attention_factor(self, length):
        return self._yarn(length).attention_factor(length)

    def _yarn(self, length: int) -> YaRN:
        shared = ("base", "original_length", "fast", "slow", "ramp", "truncate", "temperature")
        factor = max(1.0, length / self.original_length)
        return YaRN(factor=factor, **{name: getattr(self, name) for name in shared})

    @classmethod
    def examples(cls):
        return (cls(original_length=8), cls(original_length=10, ramp="rotations", temperature="none", step=4))
