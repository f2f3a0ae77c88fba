"""HoPE, hybrid of position embeddings (Li et al. 2025): space turns the fast pairs, the slow ones of time stand still."""

import dataclasses

import numpy as np

from lcx.positions.frequencies import FrequencyRule, SectionOrder, geometric


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoPE(FrequencyRule):
    """Pairs of the first axis, time, get frequency 0, so that what is far in time is not dimmed. Text turns the other pairs."""

    sections: tuple[int, ...] = (16, 24, 24)
    section_order: SectionOrder = "alternating"

    def validate(self):
        super().validate()
        self.check(bool(self.sections), "sections", "two and more")

    def inverse_frequencies(self, rotary_dim, length):
        return np.where(self.axes(rotary_dim // 2) == 0, 0.0, geometric(self.base, rotary_dim))

    @classmethod
    def examples(cls):
        return (cls(sections=(2, 1, 1)),)
