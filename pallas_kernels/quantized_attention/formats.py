"""How slots hold keys and values, and what a call of attention to them is.

A format is static; its arrays are [B, K, n, ...] with n in proportion to the S slots. Codes of 2, 3, 4 or 8 bits are packed
along tokens (`packing`), so a format that packs holds a multiple of 32 slots. Half precision is held as its bits in uint16: TPU
kernels read bits, and XLA copies what it is to reinterpret. The few numbers that a token has of its own are arrays [B, K, S]
each (`each`): a last axis that short is laid out in many ways, and XLA copies all slots from one to another.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt16

from pallas_kernels import angles
from pallas_kernels.quantized_attention.packing import BLOCK, PLANES
from pallas_kernels.tile_attention.tokens import Along, Mask, Tokens

Pairing = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class Numbers:
    """x as it is, in bfloat16 or float32. Arrays: `NumberArrays`."""


class NumberArrays(NamedTuple):
    codes: Float[Array, "B K S D"]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """x = code scale. kind: int8, or float8 of 4 exponent and 3 mantissa bits. Arrays: `ScaledArrays`."""

    kind: Literal["int8", "fp8"]


class ScaledArrays(NamedTuple):
    codes: Shaped[Array, "B K S D"]
    scale: Float[Array, "B K S"]


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """x = code scale + zero, both of `size` channels of a token. Arrays: `GroupArrays`, n = S, g = D / size."""

    bits: int
    size: int


@dataclasses.dataclass(frozen=True)
class TokenGroups:
    """x = code scale + zero, both of a channel of `size` tokens. Arrays: `GroupArrays`, n = S / size, g = D. For keys."""

    bits: int
    size: int


class GroupArrays(NamedTuple):
    """codes: planes of words. scale, zero: half precision; of channels `each` of g, of tokens an array."""

    codes: tuple[Shaped[Array, "B K _ D"], ...]
    scale: tuple[UInt16[Array, "B K S"], ...] | UInt16[Array, "B K n D"]
    zero: tuple[UInt16[Array, "B K S"], ...] | UInt16[Array, "B K n D"]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """x = codebook[code] half + zero, or the number of an outlier. Arrays: `CodebookArrays`."""

    bits: int


class CodebookArrays(NamedTuple):
    """codes: planes of words. codebook: of a head. place, number: channels of a token's outliers, D where there is none, and
    what they are, half precision, `each` of O; places below 256 come two in a word (`paired`). by_channel: zero and half range
    of a channel; by_token: of a token, half precision. Of the two there is one."""

    codes: tuple[Shaped[Array, "B K _ D"], ...]
    codebook: Float[Array, "B K c"]
    place: tuple[UInt16[Array, "B K S"], ...]
    number: tuple[UInt16[Array, "B K S"], ...]
    by_channel: Float[Array, "B K 2 D"] | None = None
    by_token: tuple[UInt16[Array, "B K S"], UInt16[Array, "B K S"]] | None = None


Format = Numbers | Scaled | ChannelGroups | TokenGroups | Codebook
Arrays = NumberArrays | ScaledArrays | GroupArrays | CodebookArrays


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static of a call. along: of the slopes. pairing: of raw keys, which the kernel rotates."""

    keys: Format
    values: Format
    mask: Mask
    scale: float
    softcap: float | None = None
    along: Along = "index"
    pairing: Pairing = "half"


class Turning(NamedTuple):
    """How far pairs turn: position times the sum of `parts`, in turns (`angles`). factor: of cosine and sine."""

    positions: Float[Array, "rows S"]  # rows: B, or B K
    parts: Float[Array, "3 C"]
    factor: Float[Array, ""]

    def tables(self) -> tuple[Float[Array, "rows S C"], Float[Array, "rows S C"]]:
        """(cosine, sine)."""
        turn = angles.turns(self.positions[..., None].astype(jnp.float32), *self.parts)
        return jnp.cos(2 * jnp.pi * turn) * self.factor, jnp.sin(2 * jnp.pi * turn) * self.factor

    def lanes(self, channels: int, pairing: Pairing) -> Float[Array, "4 D"]:
        """Parts and factor of every channel: 0 and 1 of one that has no pair."""
        rows = [widened(part, channels, pairing, 0.0) for part in self.parts]
        factor = jnp.full(self.parts.shape[1], self.factor, jnp.float32)
        return jnp.stack([*rows, widened(factor, channels, pairing, 1.0)])


def widened(table: Float[Array, "*n C"], channels: int, pairing: Pairing, rest: float) -> Float[Array, "*n D"]:
    """A table of pairs as one of channels, `rest` where a channel has no pair."""
    wide = jnp.concatenate([table, table], axis=-1) if pairing == "half" else jnp.repeat(table, 2, axis=-1)
    missing = channels - wide.shape[-1]
    return jnp.pad(wide, [(0, 0)] * (wide.ndim - 1) + [(0, missing)], constant_values=rest)


class Slots(NamedTuple):
    """tokens: of a key head or of all; segment 0 is empty, and what an empty slot holds is never looked at. used: slots of a
    row behind which all are empty. extra: added to the scores of each slot. cosine, sine: rotate the first 2C channels of raw
    keys; or turning, by which they are made. first: codes, tokens and positions of turning may have more rows than the queries,
    whose row 0 is this one of them (slots of all layers, one of which is meant)."""

    k: Arrays
    v: Arrays
    tokens: Tokens  # [B, K or 1, S]
    used: Int[Array, "B"]
    extra: Float[Array, "B K S"] | None = None
    cosine: Float[Array, "rows S C"] | None = None  # rows: B, or B K
    sine: Float[Array, "rows S C"] | None = None
    turning: Turning | None = None
    first: Int[Array, ""] | int = 0

    @property
    def own(self) -> "Slots":
        """With the rows of the queries alone."""
        B = len(self.used)
        cut = lambda x: x if len(x) == B else jax.lax.dynamic_slice_in_dim(x, self.first, B)
        found = {name: jax.tree.map(cut, getattr(self, name)) for name in ("k", "v", "tokens")}
        if self.turning is not None:
            positions = self.turning.positions
            positions = cut(positions.reshape(len(self.tokens.index), -1, positions.shape[1])).reshape(-1, positions.shape[1])
            found["turning"] = self.turning._replace(positions=positions)
        return self._replace(**found, first=0)

    @property
    def pairs(self) -> int:
        """C, 0 where keys come as they are to be met."""
        table = self.cosine if self.turning is None else self.turning.parts
        return 0 if table is None else table.shape[-1]


def channels(arrays: Arrays) -> int:
    """D of an array of codes."""
    return (arrays.codes[0] if isinstance(arrays.codes, tuple) else arrays.codes).shape[-1]


def each(x: Shaped[Array, "*n g"]) -> tuple[Shaped[Array, "*n"], ...]:
    """The last axis taken apart."""
    return tuple(x[..., n] for n in range(x.shape[-1]))


def together(parts: tuple[Shaped[Array, "*n"], ...], like: Shaped[Array, "*n"]) -> Shaped[Array, "*n g"]:
    """What `each` took apart. like: an array of these axes, for none of which anything is left."""
    return jnp.stack(parts, axis=-1) if parts else jnp.zeros((*like.shape, 0), like.dtype)


def paired(x: Sequence[Shaped[Array, "*n"]]) -> tuple[UInt16[Array, "*n"], ...]:
    """Numbers below 256, two in a word: arrays of bytes that kernels read, XLA lays out anew."""
    wide = [part.astype(jnp.uint16) for part in x]
    low, high = wide[::2], [*wide[1::2], *(jnp.zeros_like(x) for x in wide[: len(wide) % 2])]
    return tuple(a | b << 8 for a, b in zip(low, high, strict=True))


def unpaired(words: Sequence[Shaped[Array, "*n"]], count: int) -> list[Int[Array, "*n"]]:
    """The numbers of `paired`."""
    wide = [x.astype(jnp.int32) for x in words]
    return [part for x in wide for part in (x & 255, x >> 8)][:count]


def places(words: Sequence[Any], channels: int, count: int) -> list[Any]:
    """Of `count` outliers: the channel of each, an array like those of `words`."""
    return unpaired(words, count) if channels < 256 else [x.astype(jnp.int32) for x in words]


def invalid(plan: Plan, q: Shaped[Array, "B T H D"], slots: Slots) -> str | None:
    """Why a call is none that any form takes, if it is not."""
    B, _, H, D = q.shape
    K, S = jax.tree.leaves(slots.k.codes)[0].shape[1], slots.tokens.index.shape[2]
    if H % K or channels(slots.k) != D:
        return f"queries {q.shape}, {K} key heads of {channels(slots.k)}: expected a multiple of the heads, as wide"
    if slots.tokens.index.shape[1] not in (1, K) or slots.used.shape != (B,):
        return f"tokens {slots.tokens.index.shape}, used {slots.used.shape}: expected [{B}, {K} or 1, slots], [{B}]"
    rows = {len(x) for x in jax.tree.leaves((slots.k, slots.v, slots.tokens))} - {B}
    if len(rows) > 1 or any(n % B for n in rows):
        return f"slots of {sorted(rows)} rows beside {B} of queries: expected one multiple"
    if isinstance(plan.values, TokenGroups):
        return f"values = {plan.values}: expected groups of channels"
    for side, form, arrays in (("keys", plan.keys, slots.k), ("values", plan.values, slots.v)):
        if isinstance(form, Numbers | Scaled):
            continue
        if form.bits not in PLANES or (isinstance(form, Codebook) and form.bits == 8) or S % BLOCK:
            return f"{side} = {form}, {S} slots: expected 2, 3, 4 or 8 bits and a multiple of {BLOCK} slots"
        if isinstance(form, ChannelGroups) and channels(arrays) % form.size:
            return f"{side} = {form}: expected a divisor of {channels(arrays)} channels"
        if isinstance(form, TokenGroups) and S % form.size:
            return f"{side} = {form}: expected a divisor of {S} slots"
    return None
