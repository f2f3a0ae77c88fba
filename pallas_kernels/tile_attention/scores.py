"""What the Pallas kernels share: scores in base 2, their derivative, and products summed in float32."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_attention.tokens import Along, Mask, Tokens, distance

LOW = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a pair that is not visible; -inf would give NaN
LOG2E = math.log2(math.e)


class Scores(NamedTuple):
    """How products of queries and keys become scores. along: what a bias is linear in, None without one."""

    mask: Mask
    scale: float
    softcap: float | None
    along: Along | None = None

    def logits(
        self, raw: Float[Array, "n m"], tanh: Callable[[Array], Array] = jnp.tanh
    ) -> tuple[Float[Array, "n m"], Float[Array, "n m"] | int]:
        """Scores in base 2 before the mask, and their derivative by the scaled product."""
        if self.softcap is None:
            return raw * (self.scale * LOG2E), 1
        bent = tanh(raw * (self.scale / self.softcap))
        return bent * (self.softcap * LOG2E), 1 - bent * bent

    def bias(self, q: Tokens, k: Tokens) -> Float[Array, "..."]:
        """What is added to scores in base 2 for a slope of 1, of broadcastable tokens."""
        return distance(q, k, self.along).astype(jnp.float32) * -LOG2E


def in_base_2(lse: Float[Array, "B T H"], delta: Float[Array, "B T H"]) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
    """lse and delta as the backward kernels take them: 2^(s - lse) is 0 for rows that see nothing."""
    nothing = jnp.isneginf(lse)
    return jnp.where(nothing, -LOW, lse * LOG2E), jnp.where(nothing, 0, delta)


def sees_nothing(top: Any, total: Any) -> Any:
    """[...] of rows whose largest score is that of a hidden pair; not those with a NaN, which one of the two has."""
    return top + 0 * total <= LOW / 2


def dot(a: Float[Array, "..."], b: Float[Array, "..."], a_axis: int, b_axis: int) -> Float[Array, "..."]:
    """Product over an axis of each, HIGHEST if the operands are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
