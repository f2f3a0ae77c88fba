"""Biases that are known in advance: a slope for each query head, of which a device has its own heads'."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_attention.tokens import Along, Bias


@dataclasses.dataclass(frozen=True)
class Decay:
    """Hashable and static. slopes: of all query heads. axes: the mesh axes that share them out, outermost first."""

    slopes: tuple[float, ...]
    along: Along
    axes: tuple[str, ...] = ()

    def bias(self, q: Float[Array, "B T H D"]) -> Bias:
        """For the queries of this device, whose heads are its share."""
        slopes, heads = jnp.array(self.slopes, jnp.float32), q.shape[2]
        if self.axes:
            slopes = jax.lax.dynamic_slice_in_dim(slopes, jax.lax.axis_index(self.axes) * heads, heads)
        return Bias(jnp.broadcast_to(slopes, q.shape[:3]), self.along)

    def shared(self, axis: str | tuple[str, ...]) -> "Decay":
        """With each device's heads shared out once more."""
        return dataclasses.replace(self, axes=(*self.axes, *((axis,) if isinstance(axis, str) else axis)))
