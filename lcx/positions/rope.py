"""RoPE: rotary position embedding. RoFormer (Su et al. 2021), eq. 34."""

import dataclasses

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope(FrequencyRule):
    """theta_c = base ** (-2c/r) over the r rotated channels."""

    def inverse_frequencies(self, rotary_dim, length):
        return geometric(self.base, rotary_dim)

    @classmethod
    def examples(cls):
        return (cls(), cls(base=500_000.0, rotary=0.5, pairing="interleaved"))
