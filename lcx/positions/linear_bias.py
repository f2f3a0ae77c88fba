"""Biases linear in distance: a logit modifier that lets scores fall with distance, in place of a rotation or beside one.

    logits[h, i, j] -= slope[h] |x_i - x_j|,   x the index of a token in its segment, or its order

after the scale. Kernels compute it from their tokens; no array of pairs is made.
"""

import abc
import dataclasses

import numpy as np
from jaxtyping import Float

from lcx.spec import Spec
from pallas_kernels.tile_attention.decay import Decay
from pallas_kernels.tile_attention.tokens import Along


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearBias(Spec, abc.ABC):
    """Base of every bias of this kind."""

    @property
    @abc.abstractmethod
    def along(self) -> Along:
        """What the distance is of: `index` for tokens, `order` for what they belong to, such as frames."""

    @abc.abstractmethod
    def slopes(self, heads: int) -> Float[np.ndarray, "H"]:
        """Of so many query heads, in float64."""

    def decay(self, heads: int) -> Decay:
        """As the attention folds take it."""
        return Decay(tuple(map(float, self.slopes(heads))), self.along)
