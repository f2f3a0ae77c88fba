"""DPRoPE (Wu et al. 2024): each channel keeps its frequency or is interpolated, as its rotary angles stay closer to those seen.

The angles of a channel over a window are a histogram of `bins` equal bins of a turn. A candidate frequency disturbs by the
divergence of its histogram over the target window from the trained one.
"""

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
from jaxtyping import Float

from lcx.positions.frequencies import FrequencyRule, geometric

SMALLEST = 1e-8  # added to a share before its logarithm
CHUNK = 1 << 16  # positions of a histogram at a time

Divergence = Literal["new_to_old", "old_to_new"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPRoPE(FrequencyRule):
    """factor: extension of `original_length`, the trained window. A channel is interpolated if its own frequency disturbs more
    than the interpolated one by over `threshold`; `interpolated` sets the number of such pairs instead (the paper: 40 of 64 at
    twice the window, 32 at four times). divergence: KL of the new histogram from the old (paper), or the reverse (its code)."""

    factor: float
    original_length: int
    bins: int = 360
    threshold: float = 0.0
    interpolated: int | None = None
    divergence: Divergence = "new_to_old"

    def validate(self):
        super().validate()
        self.check(self.factor >= 1, "factor", "at least 1")
        self.check(self.original_length >= 1, "original_length", "at least 1 token")
        self.check(self.bins >= 2, "bins", "at least 2")
        self.check(self.interpolated is None or self.threshold == 0, "threshold", "0 where interpolated is set")

    def inverse_frequencies(self, rotary_dim, length):
        theta = geometric(self.base, rotary_dim)
        given = self.original_length, round(self.factor * self.original_length), self.bins, self.divergence
        kept, slowed = (disturbance(tuple(new), tuple(theta), *given) for new in (theta, theta / self.factor))
        gain = kept - slowed
        if self.interpolated is None:
            return np.where(gain > self.threshold, theta / self.factor, theta)
        self.check(0 <= self.interpolated <= len(theta), "interpolated", f"between 0 and the {len(theta)} pairs")
        rank = np.argsort(np.argsort(-gain, kind="stable"))
        return np.where(rank < self.interpolated, theta / self.factor, theta)

    @classmethod
    def examples(cls):
        return (
            cls(factor=4.0, original_length=64),
            cls(factor=2.0, original_length=64, interpolated=3, divergence="old_to_new"),
        )


@functools.lru_cache(maxsize=64)
def disturbance(
    new: tuple[float, ...],
    old: tuple[float, ...],
    old_length: int,
    new_length: int,
    bins: int = 360,
    divergence: Divergence = "new_to_old",
) -> Float[np.ndarray, "C"]:
    """Of each channel, how far angles of `new` frequencies over `new_length` positions are from `old` over `old_length`."""
    found, wanted = angle_histogram(np.asarray(new), new_length, bins), angle_histogram(np.asarray(old), old_length, bins)
    first, second = (found, wanted) if divergence == "new_to_old" else (wanted, found)
    return (first * np.log((first + SMALLEST) / (second + SMALLEST))).sum(axis=-1)


def angle_histogram(inv_freq: Float[np.ndarray, "C"], length: int, bins: int = 360) -> Float[np.ndarray, "C bins"]:
    """The share of positions 0 .. length - 1 whose angle falls into each bin of a turn, by channel."""
    counts = np.zeros((len(inv_freq), bins))
    for start in range(0, length, CHUNK):
        places = np.arange(start, min(start + CHUNK, length), dtype=np.float64)
        turn = places * (inv_freq / (2 * math.pi))[:, None]
        bin = np.minimum(((turn - np.floor(turn)) * bins).astype(int), bins - 1)
        for channel, row in enumerate(bin):
            counts[channel] += np.bincount(row, minlength=bins)
    return counts / length
