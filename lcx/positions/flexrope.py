"""FlexRoPE (FAR, Gu et al. 2025, first version): a bias by frames, added at test time to a model trained with a rope.

    logits[i, j] += slope (f_j - f_i),   f the frame of a token, which is its order

The slope, 0 in training, is the same for all heads and layers; the paper gives no value. Scores inside a frame keep theirs.
"""

import dataclasses

import numpy as np

from lcx.positions.linear_bias import LinearBias


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexRope(LinearBias):
    """slope: the fall of a logit a frame; where order counts tokens, as in text, a token."""

    slope: float

    def validate(self):
        self.check(self.slope >= 0, "slope", "0 or a positive number")

    @property
    def along(self):
        return "order"

    def slopes(self, heads):
        return np.full(heads, self.slope)

    @classmethod
    def examples(cls):
        return (cls(slope=0.05),)
