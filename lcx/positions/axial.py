"""Axial RoPE (FLUX 2024; FAR, Gu et al. 2025): every position axis has channels of its own, from fast to slow."""

import dataclasses

import numpy as np

from lcx.positions.frequencies import FrequencyRule, Pairing, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxialRope(FrequencyRule):
    """The frequencies of each section are those of a head of its size; FAR's 64 channels are sections of 8, 12 and 12 pairs."""

    sections: tuple[int, ...] = (8, 12, 12)
    pairing: Pairing = "interleaved"

    def validate(self):
        super().validate()
        self.check(bool(self.sections), "sections", "two and more")
        self.check(self.section_order == "contiguous", "section_order", "'contiguous'")

    def inverse_frequencies(self, rotary_dim, length):
        return np.concatenate([geometric(self.base, 2 * pairs) for pairs in self.sections])

    @classmethod
    def examples(cls):
        return (cls(sections=(2, 1, 1)),)
