"""Frequency rules: how fast each rotated channel turns. Computed on the host in float64, once per config and length."""

import abc
import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int

from lcx.batch import AnyArray
from lcx.spec import Spec, SpecError

Pairing = Literal["half", "interleaved"]
SectionOrder = Literal["contiguous", "interleaved", "alternating"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Frequencies:
    """What `rotate` needs. Channels beyond the 2C rotated ones pass through; `inv_freq` 0 leaves a rotated pair in place.

    inv_freq: radians a position, float64; of a learned rope traced, float32. axis: the position axis that drives each pair.
    factor: multiplies cosine and sine, on queries and on keys alike (Hugging Face's attention factor, so logits grow by its
    square). pairing: `half` pairs channel c with c + C, `interleaved` pairs 2c with 2c + 1.

    growth: what the logarithm of a query's pair grows by each position, and a key's shrinks by (xPos); None leaves them alone.

    Where they depend on the length n of a token's document, inv_freq and factor have a row for each of N lengths: the first up
    to `first`, the next for `step` tokens more, and so on. kept: positions below it read one row more, the last, at any length.
    """

    inv_freq: Float[AnyArray, "*N C"]
    axis: Int[np.ndarray, "C"]
    factor: float | Float[np.ndarray, "N"] = 1.0
    pairing: Pairing = "half"
    first: int = 0
    step: int = 1
    growth: Float[np.ndarray, "C"] | None = None
    kept: int = 0

    @property
    def by_length(self) -> bool:
        return self.inv_freq.ndim == 2

    def row(self, lengths):
        """The row of each of the lengths, an array of integers."""
        return ((lengths - self.first + self.step - 1) // self.step).clip(0, len(self.inv_freq) - 1 - (self.kept > 0))

    def at(self, length: int) -> "Frequencies":
        """Those of one length, at positions that are not kept."""
        if not self.by_length:
            return self
        row = int(self.row(np.int64(length)))
        return dataclasses.replace(
            self, inv_freq=self.inv_freq[row], factor=float(np.broadcast_to(self.factor, len(self.inv_freq))[row]), kept=0
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequencyRule(Spec, abc.ABC):
    """Base of every frequency rule. Subclasses give `inverse_frequencies`, and `attention_factor` where it is not 1.

    base: the rotary base. rotary: the share of the head's channels that is rotated. pairing: see `Frequencies`.

    sections: how many pairs each position axis drives (M-RoPE, Qwen2-VL 2024: (16, 24, 24) by time, row and column); empty is
    one axis. section_order: `contiguous` is one section after the other; `interleaved` takes turns until only the first has
    pairs left (Qwen3-VL 2025); `alternating` takes turns among all but the first, which has the slowest (VideoRoPE 2025).
    """

    base: float = 10_000.0
    rotary: float = 1.0
    pairing: Pairing = "half"
    sections: tuple[int, ...] = ()
    section_order: SectionOrder = "contiguous"

    learned: ClassVar[bool] = False  # has parameters, which the model builds

    def validate(self):
        self.check(self.base > 1, "base", "greater than 1")
        self.check(0 < self.rotary <= 1, "rotary", "a share in (0, 1]")
        self.check(
            len(self.sections) != 1 and all(n >= 1 for n in self.sections), "sections", "none, or 2 and more of a pair or more"
        )
        self.check(
            bool(self.sections) or self.section_order == "contiguous",
            "section_order",
            "'contiguous' where there are no sections",
        )
        if self.section_order == "alternating":
            self.check(len(set(self.sections[1:])) == 1, "sections", "as many pairs for every axis but the first")

    @abc.abstractmethod
    def inverse_frequencies(self, rotary_dim: int, length: int) -> Float[np.ndarray, "C"]:
        """Radians a position of each of the `rotary_dim / 2` pairs, float64, in rows of `length` tokens."""

    def attention_factor(self, length: int) -> float:
        return 1.0

    def frequencies(self, head_dim: int, length: int) -> Frequencies:
        """The frequencies for heads of `head_dim` channels. Raises SpecError if the rotated channels are odd or none."""
        rotary_dim = self.rotated(head_dim)
        inv_freq = np.asarray(self.inverse_frequencies(rotary_dim, length), np.float64)
        axis, factor = self.axes(rotary_dim // 2), self.attention_factor(length)
        if inv_freq.shape != (rotary_dim // 2,) or not np.isfinite(inv_freq).all():
            expected = f"expected {rotary_dim // 2} finite numbers, one a rotated pair"
            raise SpecError(f"{type(self).__name__}.inverse_frequencies of {rotary_dim} channels: {inv_freq}: {expected}")
        return Frequencies(inv_freq=inv_freq, axis=axis, factor=factor, pairing=self.pairing)

    def axes(self, pairs: int) -> Int[np.ndarray, "C"]:
        """The position axis that drives each of so many pairs."""
        if not self.sections:
            return np.zeros(pairs, np.int32)
        self.check(sum(self.sections) == pairs, "sections", f"sizes that add up to the {pairs} rotated pairs")
        if self.section_order == "contiguous":
            return np.repeat(np.arange(len(self.sections)), self.sections).astype(np.int32)
        first, *others = self.sections
        if self.section_order == "alternating":
            turns = np.tile(np.arange(1, len(self.sections)), others[0])
            return np.concatenate([turns, np.zeros(first)]).astype(np.int32)
        axis, n = np.zeros(pairs, np.int32), len(self.sections)
        for k, size in enumerate(others, 1):
            self.check(
                k + n * (size - 1) < pairs, "sections", f"at most {(pairs - k - 1) // n + 1} interleaved pairs for axis {k}"
            )
            axis[k : n * size : n] = k
        return axis

    def rotated(self, head_dim: int) -> int:
        """How many channels of a head are rotated."""
        rotary_dim = int(head_dim * self.rotary)
        self.check(rotary_dim >= 2 and rotary_dim % 2 == 0, "rotary", f"an even number of channels of head_dim {head_dim}")
        return rotary_dim


def geometric(base: float, rotary_dim: int) -> Float[np.ndarray, "C"]:
    """theta_c = base ** (-2c / rotary_dim): RoFormer (2021), section 3.2.2."""
    return float(base) ** -(np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
