"""What a tile kernel knows of its tokens, and the tile statistics that decide empty, partial or full.

A mask here is any hashable object with
  `visible(q: Tokens, k: Tokens) -> bool[...]`   broadcast over query fields [..., q, 1] and key fields [..., 1, k];
  `bounds(q: Tiles, k: Tiles) -> (may, must)`    may: some pair of the tile can be visible; must: every pair surely is.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

NEVER = jnp.iinfo(jnp.int32).max
Along = Literal["index", "order"]  # fields of tokens that count


class Tokens(NamedTuple):
    """index, order, segments, roles: int32 arrays of one shape [..., T] (lcx.batch.TokenInfo says what they mean)."""

    index: Int[Array, "..."]
    order: Int[Array, "..."]
    segments: Int[Array, "..."]
    roles: Int[Array, "..."]

    def rows(self) -> "Tokens":
        """As the query side of a broadcast: [..., T, 1]."""
        return Tokens(*(field[..., :, None] for field in self))

    def columns(self) -> "Tokens":
        """As the key side of a broadcast: [..., 1, T]."""
        return Tokens(*(field[..., None, :] for field in self))


class Bias(NamedTuple):
    """Scores fall linearly with the distance of a pair: slope |q - k| less, in units of a field of the tokens.

    slopes: of each query and head, positive where far keys count less.
    """

    slopes: Float[Array, "B T H"]
    along: Along


def distance(q: Tokens, k: Tokens, along: Along) -> Int[Array, "..."]:
    """|q - k| of broadcastable tokens."""
    return abs(getattr(q, along) - getattr(k, along))


class Tiles(NamedTuple):
    """Statistics of tiles, padding left out; every field [..., tiles]. Ranges of an empty tile are (NEVER, -NEVER)."""

    index_low: Int[Array, "..."]
    index_high: Int[Array, "..."]
    order_low: Int[Array, "..."]
    order_high: Int[Array, "..."]
    role_low: Int[Array, "..."]
    role_high: Int[Array, "..."]
    segment_low: Int[Array, "..."]  # over ordinary segments: all but 0, -1 and -2
    segment_high: Int[Array, "..."]
    ordinary: Bool[Array, "..."]  # has a token of an ordinary segment
    shared: Bool[Array, "..."]  # has a token of segment -1
    reader: Bool[Array, "..."]  # has a token of segment -2
    padding: Bool[Array, "..."]  # has a token of segment 0

    def rows(self) -> "Tiles":
        return Tiles(*(field[..., :, None] for field in self))

    def columns(self) -> "Tiles":
        return Tiles(*(field[..., None, :] for field in self))


@runtime_checkable
class Mask(Protocol):
    def __hash__(self) -> int: ...
    def visible(self, q: Tokens, k: Tokens) -> Bool[Array, "..."]: ...
    def bounds(self, q: Tiles, k: Tiles) -> tuple[Bool[Array, "..."], Bool[Array, "..."]]: ...


def pad_tokens(tokens: Tokens, multiple: int) -> Tokens:
    """Appends padding tokens (all fields 0) along the last axis up to a multiple."""
    missing = -tokens.index.shape[-1] % multiple
    widths = [(0, 0)] * (tokens.index.ndim - 1) + [(0, missing)]
    return Tokens(*(jnp.pad(field, widths) for field in tokens))


def tiles(tokens: Tokens, size: int) -> Tiles:
    """Statistics of consecutive tiles of `size` tokens; the length must be a multiple of `size`.

    All are smallest values, of one reduction: twelve side by side take the TPU compiler up to a minute.
    """
    index, order, segments, roles = (field.reshape(*field.shape[:-1], -1, size) for field in tokens)
    real, ordinary = segments != 0, (segments > 0) | (segments < -2)
    ranges = (index, real), (order, real), (roles, real), (segments, ordinary)
    either = ordinary, segments == -1, segments == -2, ~real
    fields = [jnp.where(where, sign * field, NEVER) for field, where in ranges for sign in (1, -1)]
    *ranges, ordinary, shared, reader, padding = jnp.min(
        jnp.stack([*fields, *(1 - x.astype(jnp.int32) for x in either)]), axis=-1
    )
    low_high = [sign * low for low, sign in zip(ranges, (1, -1) * 4, strict=True)]
    return Tiles(*low_high, ordinary == 0, shared == 0, reader == 0, padding == 0)
