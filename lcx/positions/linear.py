"""Linear position interpolation (Chen et al. 2023), eq. 4: every position is divided by the extension factor."""

import dataclasses

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearInterpolation(FrequencyRule):
    """theta_c / factor. The scale is static: it stays in force at lengths the model was trained for."""

    factor: float

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")

    def inverse_frequencies(self, rotary_dim, length):
        return geometric(self.base, rotary_dim) / self.factor

    @classmethod
    def examples(cls):
        return (cls(factor=1.0), cls(factor=4.0), cls(factor=2.5, rotary=0.5))
