"""What folds by a distance plan have in common: queries and keys come raw and are turned inside, each by its own token's index.

So keys may travel over a mesh or lie in a cache before they are turned.
"""

import dataclasses

from lcx.attention.mask import Mask
from lcx.positions.distance_plan import Distances
from pallas_kernels.tile_attention import op


@dataclasses.dataclass(frozen=True)
class DistanceFold(op.Fold):
    """Base of the two: regions of pairs (`regions.py`) and chunks that queries choose (`chosen_chunks.py`)."""

    form: str
    mask: Mask
    scale: float
    softcap: float | None
    distances: Distances
