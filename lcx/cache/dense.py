"""The dense cache: every key and value of the row, in a preallocated array, one slot a token.

Each row fills its own slots in order; padding consumes none. A key is stored `rotated` when its angle never changes after it
is written, else `raw` and rotated on read. Tokens that find no slot are counted in `overflow`, never dropped unseen: whoever
drives the cache checks it.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.attention.attend import attend
from lcx.attention.mask import Mask
from lcx.batch import PADDING, TokenInfo
from lcx.positions.frequencies import Frequencies
from lcx.positions.rotate import rotate
from lcx.record import record
from lcx.spec import Spec


@record
class DenseState:
    """k, v: the slots. info: the TokenInfo each slot was written with (segment 0: empty). used: slots filled a row."""

    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K E"]
    info: TokenInfo
    used: Int[Array, "B"]
    overflow: Int[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseCache(Spec):
    """keys: whether slots hold rotated or raw keys."""

    keys: Literal["rotated", "raw"] = "rotated"

    def init(
        self, batch_size: int, length: int, kv_heads: int, head_dim: int, value_dim: int, dtype, axes: int = 1
    ) -> DenseState:
        """An empty cache of `length` slots a row, for tokens with `axes` position axes."""
        empty = jnp.zeros((batch_size, length), jnp.int32)
        info = TokenInfo(
            index=empty,
            order=empty,
            positions=jnp.zeros((batch_size, length, axes), jnp.float32),
            segments=jnp.full_like(empty, PADDING),
            roles=empty,
        )
        return DenseState(
            k=jnp.zeros((batch_size, length, kv_heads, head_dim), dtype),
            v=jnp.zeros((batch_size, length, kv_heads, value_dim), dtype),
            info=info,
            used=empty[:, 0],
            overflow=empty[:, 0],
        )

    def append(
        self,
        state: DenseState,
        k: Float[Array, "B T K D"],
        v: Float[Array, "B T K E"],
        info: TokenInfo,
        frequencies: Frequencies | None,
    ) -> DenseState:
        """Writes the non-padding tokens of a chunk after those already there; `k` comes raw."""
        if self.keys == "rotated" and frequencies is not None:
            k = rotate(k, info.positions, frequencies)
        if info.roles is None:
            info = dataclasses.replace(info, roles=jnp.zeros_like(info.index))
        real = info.segments != PADDING
        length = state.k.shape[1]
        slot = state.used[:, None] + jnp.cumsum(real, axis=1) - 1
        slot = jnp.where(real, slot, length)  # out of range: dropped by the scatter
        row = jnp.arange(k.shape[0])[:, None]
        write = lambda old, new: old.at[row, slot].set(new.astype(old.dtype), mode="drop")
        count = state.used + real.sum(axis=1)
        return DenseState(
            k=write(state.k, k),
            v=write(state.v, v),
            info=jax.tree.map(write, state.info, info),
            used=jnp.minimum(count, length),
            overflow=state.overflow + jnp.maximum(count - length, 0),
        )

    def read(self, state: DenseState, frequencies: Frequencies | None) -> tuple[Array, Array, TokenInfo]:
        """(rotated k, v, info) of every slot; empty slots have segment 0."""
        k = state.k
        if self.keys == "raw" and frequencies is not None:
            k = rotate(k, state.info.positions, frequencies).astype(k.dtype)
        return k, state.v, state.info

    def attend(
        self,
        state: DenseState,
        q: Float[Array, "B T H D"],
        q_info: TokenInfo,
        *,
        mask: Mask,
        scale: float,
        frequencies: Frequencies | None,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
        """Attention of rotated queries, already appended, to every slot."""
        k, v, info = self.read(state, frequencies)
        return attend(q, k, v, q_info, info, mask=mask, scale=scale, softcap=softcap, backend=backend)

    @classmethod
    def examples(cls):
        return (cls(), cls(keys="raw"))
