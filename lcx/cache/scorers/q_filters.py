"""Q-Filters (2025): keys that lie where a head's queries do, in the one direction that most of them share.

    u = first right singular vector of the queries of many texts, after their rotation, on the side that their mean is on
    score_j = mean over the group's heads of u . k_j

`experiments.calibrate --method=QFilters` makes the directions. The authors hold -u, and score by minus the product; their sign
is that of most queries, not of their mean.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lcx.cache.known import Measured, arrays_of
from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFilters(Measured, Scorer):
    """directions: of each layer, key head and channel, means over the group: numbers, a file that has them as `directions`
    [L, K, D], or a shipped model's name."""

    MEASURED = ("directions", "qfilters.npz")
    ARRAYS = "directions"

    directions: tuple[tuple[tuple[float, ...], ...], ...] | str

    @property
    def by_layer(self):
        return True

    @property
    def turned(self):
        return True

    def tables(self, layer, kv_heads, head_dim):
        held = self.directions
        if isinstance(held, str):
            held = arrays_of(self)["directions"]
        if layer >= len(held) or np.shape(held[layer]) != (kv_heads, head_dim):
            found = f"{len(held)} layers of {np.shape(held[0]) if len(held) else ()}"
            self.fail(
                "directions", self.directions, f"{(kv_heads, head_dim)} numbers of layer {layer} of this model, not {found}"
            )
        return np.asarray(held[layer], np.float32)

    def score(self, now):
        return jnp.einsum("bknd,bkd->bkn", now.k, now.known, precision="highest")

    @classmethod
    def examples(cls):
        along = lambda channel: tuple(float(n == channel) for n in range(8))
        return (cls(directions=((along(0), along(3)),)),)


def direction(square: Float[np.ndarray, "H D D"], total: Float[np.ndarray, "H D"], kv_heads: int) -> Float[np.ndarray, "K D"]:
    """Directions of one layer from its queries' sum of q q^T and sum."""
    u = np.linalg.eigh(np.asarray(square, np.float64))[1][:, :, -1]
    u = u * np.where(np.einsum("hd,hd->h", u, np.asarray(total, np.float64)) < 0, -1, 1)[:, None]
    return u.reshape(kv_heads, -1, u.shape[1]).mean(axis=1)
