"""Static shapes for inputs of any length: lengths are rounded up to few buckets, so that XLA compiles once a bucket."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

SMALLEST, LONG = 16, 1 << 15


def bucket(length: int) -> int:
    """The smallest of 16, 24, 32, 48, 64, 96, ... (powers of two and their 1.5-fold) that holds `length`; of long ones, whose
    room costs more than a compilation, a sixteenth of a power of two after the other."""
    power = SMALLEST
    while power * 2 < length:
        power *= 2
    step = power // (16 if power >= LONG else 2)
    return power if length <= power else power + -(-(length - power) // step) * step


def right_padded(
    rows: Sequence[Sequence[int]], length: int, count: int, vocab: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """(tokens, segments): `count` rows of `length`, each given row in front as segment 1, the rest padding.

    Raises ValueError for an id that is none of the `vocab` rows of the embedding.
    """
    tokens, segments = np.zeros((count, length), np.int32), np.zeros((count, length), np.int32)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = row
        segments[n, : len(row)] = 1
    outside = tokens[(tokens < 0) | (tokens >= vocab)]
    if outside.size:
        raise ValueError(f"token id {outside[0]}: expected an id of the model's vocabulary, 0 to {vocab - 1}")
    return tokens, segments
