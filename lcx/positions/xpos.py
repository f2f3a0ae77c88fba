"""xPos (Sun et al. 2023, A Length-Extrapolatable Transformer): RoPE whose pairs fade with distance, fast ones sooner.

    query pairs times zeta_c^(p / scale_base), key pairs times zeta_c^(-p / scale_base),   zeta_c = (2c + 0.4 r) / 1.4 r
so that two tokens at a distance d have zeta_c^(d / scale_base). A model trained with RoPE does not become one (Giraffe 2023).
"""

import dataclasses
import math

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric

LARGEST = 80.0  # exponents that leave float32 and bfloat16 room for the numbers themselves


@dataclasses.dataclass(frozen=True, kw_only=True)
class XPos(FrequencyRule):
    """scale_base: positions over which a pair fades by its zeta. Rows are limited, since keys grow as queries shrink."""

    scale_base: int = 512

    def validate(self):
        super().validate()
        self.check(self.scale_base >= 1, "scale_base", "at least 1 token")

    def inverse_frequencies(self, rotary_dim, length):
        return geometric(self.base, rotary_dim)

    def frequencies(self, head_dim, length):
        rotary_dim = self.rotated(head_dim)
        growth = np.log((np.arange(0, rotary_dim, 2) + 0.4 * rotary_dim) / (1.4 * rotary_dim)) / self.scale_base
        most = int(LARGEST / -growth.min())
        self.check(length <= most, "scale_base", f"at least {math.ceil(self.scale_base * length / most)} in rows of {length}")
        return dataclasses.replace(super().frequencies(head_dim, length), growth=growth)

    @classmethod
    def examples(cls):
        return (cls(pairing="interleaved"), cls(scale_base=64))
