"""Power basis (Giraffe, Pal et al. 2023, section 3.2): slow channels are slowed more, down to none of their frequency."""

import dataclasses

import numpy as np

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerBasis(FrequencyRule):
    """theta_c (1 - c / C) ** power over the C pairs. For fine-tuning: without it, already the trained window suffers."""

    power: float = 0.5

    def validate(self):
        super().validate()
        self.check(self.power >= 0, "power", "at least 0")

    def inverse_frequencies(self, rotary_dim, length):
        pairs = rotary_dim // 2
        return geometric(self.base, rotary_dim) * (1 - np.arange(pairs) / pairs) ** self.power

    @classmethod
    def examples(cls):
        return (cls(), cls(power=1.0))
