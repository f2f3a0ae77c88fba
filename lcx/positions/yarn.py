"""YaRN and NTK-by-parts (Peng et al. 2023): fast channels keep their frequency, slow ones are interpolated, the rest blend.

`ramp` chooses among the three published blends of channel c with m_c the share that is kept:
  index      m_c falls linearly in c between the channels that make `fast` and `slow` turns in the trained window
             (authors' code and Hugging Face; `truncate` rounds the two ends outward);
  rotations  m_c rises linearly in the turns r_c = original_length / wavelength between `slow` and `fast` (paper, eq. 17-20);
  harmonic   the index ramp, but wavelengths are blended instead of frequencies.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class YaRN(FrequencyRule):
    """factor: extension of `original_length`, the trained window. `temperature`: `yarn` multiplies cosine and sine by
    0.1 ln(factor) + 1, `none` is NTK-by-parts; `mscale` and `mscale_all_dim` replace it by the ratio of two such terms."""

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    ramp: Literal["index", "rotations", "harmonic"] = "index"
    truncate: bool = True
    temperature: Literal["yarn", "none"] | float = "yarn"
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.original_length >= 1, "original_length", "at least 1 token")
        self.check(self.fast > self.slow > 0, "fast", f"more turns than slow = {self.slow}, which must be positive")
        self.check(self.truncate or self.ramp != "rotations", "truncate", "True: the rotations ramp has no ends to round")
        numeric = isinstance(self.temperature, float)
        self.check(not numeric or self.temperature > 0, "temperature", "'yarn', 'none' or a positive number")
        both = (self.mscale is None) == (self.mscale_all_dim is None)
        self.check(both, "mscale", "set together with mscale_all_dim or not at all")
        self.check(self.mscale is None or self.temperature == "yarn", "temperature", "'yarn' where mscale is set")

    def inverse_frequencies(self, rotary_dim, length):
        theta = geometric(self.base, rotary_dim)
        kept = self._kept(theta, rotary_dim)
        if self.ramp == "harmonic":
            return theta / ((1 - kept) * self.factor + kept)
        return theta * kept + theta / self.factor * (1 - kept)

    def attention_factor(self, length):
        if self.mscale is not None and self.mscale_all_dim is not None:
            return _temperature(self.factor, self.mscale) / _temperature(self.factor, self.mscale_all_dim)
        if self.temperature == "none":
            return 1.0
        return _temperature(self.factor, 1.0) if self.temperature == "yarn" else float(self.temperature)

    def _kept(self, theta: np.ndarray, rotary_dim: int) -> np.ndarray:
        if self.ramp == "rotations":
            made = self.original_length * theta / (2 * math.pi)
            return np.clip((made - self.slow) / (self.fast - self.slow), 0, 1)
        low, high = (self._channel(rotation, rotary_dim) for rotation in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        self.check(high >= 0, "original_length", f"at least the {2 * math.pi * self.slow:.3g} tokens of `slow` turns")
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001
        return 1 - np.clip((np.arange(rotary_dim // 2) - low) / (high - low), 0, 1)

    def _channel(self, rotations: float, rotary_dim: int) -> float:
        """The fractional channel that makes `rotations` turns in the trained window."""
        return rotary_dim * math.log(self.original_length / (rotations * 2 * math.pi)) / (2 * math.log(self.base))

    @classmethod
    def examples(cls):
        ramps = (cls(factor=4.0, original_length=256, ramp=ramp) for ramp in ("index", "rotations", "harmonic"))
        return (*ramps, cls(factor=4.0, original_length=128, truncate=False, temperature="none"))


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
