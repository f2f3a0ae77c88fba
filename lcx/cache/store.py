"""Keys and values in slots that may be written again, each with the `TokenInfo` of what stands in it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.batch import TokenInfo
from lcx.record import record


@record
class Store:
    """A slot of segment 0 is empty."""

    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K E"]
    info: TokenInfo

    def put(self, slot: Int[Array, "B T"], new: "Store") -> "Store":
        """With tokens in these slots; a slot beyond the last drops its token."""
        row = jnp.arange(len(slot))[:, None]
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(new), strict=True)
        written = [old.at[row, slot].set(new.astype(old.dtype), mode="drop") for old, new in pairs]
        return jax.tree.unflatten(jax.tree.structure(self), written)


def joined(*stores: Store) -> Store:
    """One behind the other; what is static is that of the last."""
    parts = zip(*map(jax.tree.leaves, stores), strict=True)
    joined = [jnp.concatenate(part, axis=1) for part in parts]
    return jax.tree.unflatten(jax.tree.structure(stores[-1]), joined)
