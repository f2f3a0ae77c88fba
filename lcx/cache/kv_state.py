"""What a KV cache holds, and how tokens and blocks of tokens move in it."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, TokenInfo
from lcx.cache.layered import Layered
from lcx.record import record, replaced, static
from pallas_kernels.token_gather.op import plainly

TILE = 128  # slots


@record
class Waiting:
    """Tokens in full precision, oldest first, padding behind them. marks: attention received so far, if a policy reads it."""

    k: Float[Array, "B R K D"]
    v: Float[Array, "B R K E"]
    info: TokenInfo
    marks: Float[Array, "B R K"] | None


@record
class Held:
    """Slots. k, v: codes. info: [B, G, S], G the key heads where each holds tokens of its own, else 1; segment 0 is empty.
    marks: attention received. counts: tokens that each stands for. pages: what a selector is told of slots."""

    k: Any
    v: Any
    info: TokenInfo
    marks: Float[Array, "B K S"] | None
    counts: Float[Array, "B K S"] | None
    pages: Any = None


@record
class KVState:
    """length: that it was made for. share: of the mean budget, the layer's. held: slots, within a scan over layers those of
    all. used: slots taken, with those that a block leaves empty. seen: tokens read. newest: the last queries, if a policy or a
    selector reads them; watched: what a policy made of all; known: what it knew beforehand. tables: what the codec did.
    overflow: tokens that found no slot. selects: whether the layer's selector chooses. repeats: in a second reading, whose
    passes are not kept, the index of the first token that a pass repeats."""

    in_place: ClassVar[tuple[str, ...]] = ("held",)
    remedy: ClassVar[str] = "rows of fewer tokens, or, behind a policy that drops in prefill alone, a larger policy.every"

    length: int = static()
    share: float = static()
    held: Held | Layered
    waiting: Waiting
    used: Int[Array, "B G"]
    seen: Int[Array, "B"]
    newest: Float[Array, "B W H D"]
    newest_info: TokenInfo
    watched: Any
    known: Any
    tables: Any
    overflow: Int[Array, "B"]
    selects: Bool[Array, "B"] | None = None
    repeats: Int[Array, ""] | None = None

    @property
    def slots(self) -> Held:
        """The layer's own."""
        return self.held.own() if isinstance(self.held, Layered) else self.held

    def with_slots(self, **fields: Any) -> "KVState":
        """With other fields of the layer's slots."""
        held = self.held
        held = held.put(**fields) if isinstance(held, Layered) else dataclasses.replace(held, **fields)
        return dataclasses.replace(self, held=held)


@record
class Pass:
    """A state and the tokens of a pass, as the cache holds keys, before it is pruned."""

    state: KVState
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K E"]
    info: TokenInfo


def no_tokens(rows: int, length: int, axes: int) -> TokenInfo:
    """Padding."""
    empty = jnp.zeros((rows, length), jnp.int32)
    positions = jnp.zeros((rows, length, axes), jnp.float32)
    return TokenInfo(
        index=empty, order=empty, positions=positions, segments=jnp.full_like(empty, PADDING), roles=empty, lengths=empty
    )


def rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def whole_tiles(slots: int, multiple: int) -> int:
    """So many slots, or some more: a multiple, and where that adds at most an eighth, whole tiles of a TPU too, which would
    else lay all of them out in another way at every pass."""
    whole = math.lcm(multiple, TILE)
    return rounded_up(slots, multiple if slots < 8 * whole else whole)


def taken(tree: Any, place: Int[Array, "*n C"]) -> Any:
    """The tokens at some places of arrays [*n, T, ...]."""
    return plainly(tree, place)


def taken_first(tree: Any, there: Bool[Array, "B T"]) -> Any:
    """The tokens that are there in front, in their order."""
    return taken(tree, jnp.argsort(~there, axis=1, stable=True))


def grown(state: KVState, new: TokenInfo) -> KVState:
    """With the lengths of documents that the tokens of a pass belong to, where they grow."""

    def longer(info: TokenInfo) -> TokenInfo:
        same = (info.segments[..., None] == new.segments.reshape(-1, *(1,) * (info.segments.ndim - 1), new.shape[1])) & (
            info.segments[..., None] != PADDING
        )
        newest = jnp.where(same, new.lengths.reshape(-1, *(1,) * (info.segments.ndim - 1), new.shape[1]), 0).max(
            axis=-1, initial=0
        )
        return replaced(info, lengths=jnp.maximum(info.lengths, newest))

    held = state.with_slots(info=longer(state.slots.info)).held
    return dataclasses.replace(state, held=held, waiting=dataclasses.replace(state.waiting, info=longer(state.waiting.info)))


def joined(state: Pass) -> Waiting:
    """The tokens in full precision: those that waited, and those of the pass."""
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    wait, marks = state.state.waiting, None
    if wait.marks is not None:
        marks = join(wait.marks, jnp.zeros((*state.info.segments.shape, state.k.shape[2])))
    return Waiting(
        k=join(wait.k, state.k), v=join(wait.v, state.v), info=jax.tree.map(join, wait.info, state.info), marks=marks
    )


def hidden(info: TokenInfo, there: Bool[Array, "*n"]) -> TokenInfo:
    """With padding where there is no token."""
    return replaced(info, segments=jnp.where(there, info.segments, PADDING))
