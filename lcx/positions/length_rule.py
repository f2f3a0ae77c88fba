"""Frequency rules that depend on the length of the document that a token stands in.

The lengths are `TokenInfo.lengths`. A pass over whole rows counts them itself; in generation whoever drives it says what they
are: `frozen` is the prompt with all tokens that may follow, known from the start, so that steps give what one pass gives;
`growing` is what has been read so far (as published), so that keys are turned anew with every token while the hidden states
under them stay what they were.
"""

import abc
import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

from lcx.positions.frequencies import Frequencies, FrequencyRule
from lcx.spec import Spec, SpecError, below

LARGEST = 1 << 23  # numbers of a table

Policy = Literal["frozen", "growing"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthRule(FrequencyRule):
    """Base of the rules whose frequencies change beyond `original_length`, the trained window. length_policy: see above."""

    original_length: int
    length_policy: Policy = "frozen"

    rows: ClassVar[int | None] = None  # of the table, where longer lengths change nothing more

    def validate(self):
        super().validate()
        self.check(self.original_length >= 1, "original_length", "at least 1 token")

    @property
    @abc.abstractmethod
    def spacing(self) -> int:
        """Tokens beyond the window in which frequencies stay the same; a length is rounded up to them."""

    def frequencies(self, head_dim: int, length: int) -> Frequencies:
        """A row for every length up to `length`. Raises SpecError if there are too many."""
        rotary_dim, beyond = self.rotated(head_dim), max(0, length - self.original_length)
        rows = 1 + math.ceil(beyond / self.spacing) if self.rows is None else self.rows
        self.check(
            rows * rotary_dim <= LARGEST,
            "original_length",
            f"a table of at most {LARGEST:,} numbers, not {rows:,} lengths up to {length:,} of {rotary_dim} channels: set step",
        )
        lengths = [self.original_length + row * self.spacing for row in range(rows)]
        return Frequencies(
            inv_freq=np.stack([np.asarray(self.inverse_frequencies(rotary_dim, n), np.float64) for n in lengths]),
            axis=self.axes(rotary_dim // 2),
            factor=np.asarray([self.attention_factor(n) for n in lengths]),
            pairing=self.pairing,
            first=self.original_length,
            step=self.spacing,
        )


def length_policy(spec: Spec) -> Policy | None:
    """That of the parts below a spec that read lengths, None if there are none. Raises SpecError if they differ."""
    reads = lambda part: isinstance(part, LengthRule) or getattr(part, "reads_lengths", False)
    found = {part.length_policy for _, part in below(spec) if reads(part)}
    if len(found) > 1:
        raise SpecError("length_policy = frozen and growing in one model: expected the same for every length-dependent rope")
    return found.pop() if found else None
