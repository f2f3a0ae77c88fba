"""Dynamic NTK (emozilla 2023; YaRN paper, Peng et al. 2023, section 3.3): the base grows with the length in use."""

import dataclasses

from lcx.positions.frequencies import geometric
from lcx.positions.length_rule import LengthRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK(LengthRule):
    """base' = base * (factor n / L - (factor - 1)) ** (r / (r - 2)) for documents of n > L = `original_length` tokens.

    factor 1 is the paper's, which slows the slowest pair by n / L. step: lengths are rounded up to as many tokens beyond L.
    """

    factor: float = 1.0
    step: int = 1

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.step >= 1, "step", "at least 1 token")

    @property
    def spacing(self):
        return self.step

    def inverse_frequencies(self, rotary_dim, length):
        self.check(rotary_dim > 2, "rotary", f"more than the {rotary_dim} rotated channels: the exponent is r / (r - 2)")
        grown = self.factor * max(length, self.original_length) / self.original_length - (self.factor - 1)
        return geometric(self.base * grown ** (rotary_dim / (rotary_dim - 2)), rotary_dim)

    @classmethod
    def examples(cls):
        return (cls(original_length=8), cls(original_length=4, factor=4.0, step=3))
