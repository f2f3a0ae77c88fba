"""NTK-aware base change (bloc97 2023; YaRN paper, Peng et al. 2023, definition 1)."""

import dataclasses

from lcx.positions.frequencies import FrequencyRule, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class NTK(FrequencyRule):
    """base' = base * factor ** (r / (r - 2)): the fastest pair keeps its frequency, the slowest is slowed by `factor`.

    The usable length is shorter than factor times the trained one, so the factor must be set above the wanted ratio.
    """

    factor: float

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")

    def inverse_frequencies(self, rotary_dim, length):
        self.check(rotary_dim > 2, "rotary", f"more than the {rotary_dim} rotated channels: the exponent is r / (r - 2)")
        return geometric(self.base * self.factor ** (rotary_dim / (rotary_dim - 2)), rotary_dim)

    @classmethod
    def examples(cls):
        return (cls(factor=1.0), cls(factor=4.0))
