"""ALiBi (Press et al. 2022, Train Short, Test Long): scores fall linearly with distance, each head at its own slope.

For H heads, a power of two, m_h = 2^(-8h/H), h = 1..H. Else those of the power of two below, followed by every other one of
the power of two above.
"""

import dataclasses

import numpy as np

from lcx.positions.linear_bias import LinearBias


@dataclasses.dataclass(frozen=True, kw_only=True)
class ALiBi(LinearBias):
    """Takes the place of a rope (`rope = 'none'`). Keys ahead of a query, where its order shows them, fall likewise."""

    @property
    def along(self):
        return "index"

    def slopes(self, heads):
        below = 1 << (heads.bit_length() - 1)
        between = _geometric(2 * below)[::2]
        return np.concatenate([_geometric(below), between[: heads - below]])

    @classmethod
    def examples(cls):
        return (cls(),)


def _geometric(heads: int) -> np.ndarray:
    return 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
