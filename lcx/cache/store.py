"""Keys and values in slots that may be written again, each with the `TokenInfo` of what stands in it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.batch import TokenInfo
from lcx.record import record
from pallas_kernels.target import platform


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
        written = [put(old, new.astype(old.dtype), row, slot) for old, new in pairs]
        return jax.tree.unflatten(jax.tree.structure(self), written)


def put(old, new, row, slot):
    """Arrays [B, S, ...] with new tokens at `slot` of `row`; a slot beyond the last drops its token."""
    return old.at[row, slot].set(new, mode="drop")


@jax.custom_vjp
def put_in_place(old, new, row, slot):
    """`put` behind a loop of a turn at most: XLA fuses nothing across it, where it would copy the slots for each reader."""
    there = (slot < old.shape[1]).any().astype(jnp.int32)
    return jax.lax.fori_loop(0, there, lambda _, held: put(held, new, row, slot), old)


def _pull(saved, slope):
    row, slot = saved
    return put(slope, 0, row, slot), slope.at[row, slot].get(mode="fill", fill_value=0), None, None


put_in_place.defvjp(lambda old, new, row, slot: (put_in_place(old, new, row, slot), (row, slot)), _pull)


def putting(tokens: int) -> Callable:
    """How keys and values of a pass of so many tokens are put: one token in place, where a CPU would copy all slots."""
    return put_in_place if tokens == 1 and platform() == "cpu" else put


def joined(*stores: Store) -> Store:
    """One behind the other; what is static is that of the last."""
    parts = zip(*map(jax.tree.leaves, stores), strict=True)
    joined = [jnp.concatenate(part, axis=1) for part in parts]
    return jax.tree.unflatten(jax.tree.structure(stores[-1]), joined)
