"""Batch and TokenInfo: what flows from the data to the loss, with static shapes.

Axis letters of the whole project: `B` batch, `T` tokens (query side), `S` keys, `H` query heads, `K` key/value heads,
`D` head size, `E` value size, `M` model width, `F` hidden width, `V` vocabulary, `L` layers, `P` position axes, `C` rotated
channel pairs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.record import record

AnyArray = Array | np.ndarray  # batches start on the host

SHARED = -1  # a segment that every segment sees: anchor, common prompt, persistent tokens
READER = -2  # a segment that sees every segment: a ranking query
PADDING = 0
EXACT_POSITIONS = 1 << 24  # beyond it float32 no longer holds every integer


@record
class TokenInfo:
    """What each token is. One record serves the query side and the key side of everything.

    index: 0-based place inside its own segment, the unit of windows, sinks, chunks and distance regions.
    order: visibility only (`order[key] <= order[query]`): the index for causal text, constant for bidirectional parts.
    positions: what the rotation reads; may be fractional, skipped, grouped or synthetic.
    segments: > 0 ordinary, 0 padding, -1 shared (seen by every segment), -2 reader (sees every segment).
    roles: 0 ordinary; other values are declared by the spec that adds such tokens.
    lengths: tokens of the token's own document, in generation of what it may become; read by length-dependent ropes alone.
    """

    index: Int[AnyArray, "B T"]
    order: Int[AnyArray, "B T"]
    positions: Float[AnyArray, "B T P"]
    segments: Int[AnyArray, "B T"]
    roles: Int[AnyArray, "B T"] | None = None
    lengths: Int[AnyArray, "B T"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape

    def filled(self) -> "TokenInfo":
        """With zeros where it has no roles or lengths."""
        absent = [name for name in ("roles", "lengths") if getattr(self, name) is None]
        return dataclasses.replace(self, **dict.fromkeys(absent, self.index * 0))

    def take(self, columns: slice) -> "TokenInfo":
        """The tokens of a static slice along T."""
        return jax.tree.map(lambda leaf: leaf[:, columns], self)


@record
class Batch:
    """One batch of rows. The data pipeline shifts targets; nobody else does.

    tokens: -1 where the dense `embeds` replaces the embedding of a token.
    targets: the token to predict AT t. loss_weights: its weight, 0 at a document's last token and on padding.
    side: what an objective names (advantages, teacher logits, group ids).
    """

    tokens: Int[AnyArray, "B T"]
    info: TokenInfo
    targets: Int[AnyArray, "B T"] | None = None
    loss_weights: Float[AnyArray, "B T"] | None = None
    embeds: Float[AnyArray, "B T M"] | None = None
    side: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape


def causal_info(
    segments: Int[AnyArray, "B T"], start: Int[AnyArray, "B"] | None = None, lengths: Int[AnyArray, "B T"] | None = None
) -> TokenInfo:
    """TokenInfo of ordinary causal text: index counts the tokens of a segment; order and positions are the index.

    `start [B]` is the index of each row's first non-padding token, whose segment then continues a prompt; default 0.
    Padding (segment 0) may stand anywhere; its index is 0 and it is never visible. Works on NumPy and JAX arrays.
    Raises ValueError for segments that are not rows of tokens.
    """
    given, segments = segments, jnp.asarray(segments)
    if segments.ndim != 2 or not jnp.issubdtype(segments.dtype, jnp.integer):
        raise ValueError(f"causal_info: segments {segments.shape} {segments.dtype}: expected integers [rows, tokens]")
    if isinstance(given, (np.ndarray, list, tuple)) and np.min(given, initial=0) < READER:
        raise ValueError(f"causal_info: segment {np.min(given)}: expected documents from 1, 0, {SHARED} or {READER}")
    segments = segments.astype(jnp.int32)
    index = document_index(segments)
    if start is not None:
        real = segments != PADDING
        first = jnp.take_along_axis(segments, jnp.argmax(real, axis=1, keepdims=True), axis=1)
        index = index + jnp.where(real & (segments == first), jnp.asarray(start, jnp.int32)[:, None], 0)
    positions = index[..., None].astype(jnp.float32)
    return TokenInfo(index=index, order=index, positions=positions, segments=segments, lengths=lengths)


def lengths_of(info: TokenInfo) -> Int[AnyArray, "B T"]:
    """The lengths that it holds, else those of its documents, all of whose tokens are here."""
    return document_lengths(info) if info.lengths is None else info.lengths


def document_lengths(info: TokenInfo) -> Int[Array, "B T"]:
    """One more than the largest index in a token's own segment, whatever stands between its tokens; 0 for padding."""

    def of_row(segments, index):
        order = jnp.argsort(segments)
        grouped, index = segments[order], index[order]
        begins = jnp.concatenate([jnp.ones(1, bool), grouped[1:] != grouped[:-1]])
        most = jax.ops.segment_max(index, jnp.cumsum(begins) - 1, num_segments=len(index))
        return jnp.zeros_like(index).at[order].set(most[jnp.cumsum(begins) - 1] + 1)

    lengths = jax.vmap(of_row)(jnp.asarray(info.segments), jnp.asarray(info.index))
    return jnp.where(info.segments != PADDING, lengths, 0).astype(jnp.int32)


def document_index(segments: Int[AnyArray, "B T"]) -> Int[AnyArray, "B T"]:
    """How many tokens of its own segment stand before each token, whatever stands between them; 0 for padding."""
    xp, cummax = (jnp, jax.lax.cummax) if isinstance(segments, jax.Array) else (np, np.maximum.accumulate)
    order = xp.argsort(segments, axis=1, stable=True)
    grouped = xp.take_along_axis(segments, order, axis=1)
    begins = xp.concatenate([xp.ones_like(grouped[:, :1], bool), grouped[:, 1:] != grouped[:, :-1]], axis=1)
    column = xp.broadcast_to(xp.arange(segments.shape[1], dtype=xp.int32), segments.shape)
    place = column - cummax(xp.where(begins, column, 0), axis=1)
    index = xp.take_along_axis(place, xp.argsort(order, axis=1), axis=1)
    return xp.where(segments != PADDING, index, 0).astype(xp.int32)


def sum_before(values: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Sum over the tokens of the same document that stand before each."""
    order = jnp.argsort(segments, axis=1, stable=True)
    grouped, values = (jnp.take_along_axis(x, order, axis=1) for x in (segments, values))
    total = jnp.cumsum(values, axis=1) - values
    begins = jnp.concatenate([jnp.ones_like(grouped[:, :1], bool), grouped[:, 1:] != grouped[:, :-1]], axis=1)
    first = jax.lax.cummax(jnp.where(begins, total, 0), axis=1)
    return jnp.take_along_axis(total - first, jnp.argsort(order, axis=1), axis=1)
