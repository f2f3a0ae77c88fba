"""How slots hold keys and values, and what a call of attention to them is.

A format is static; its arrays are [B, K, n, ...] with n in proportion to the S slots. Codes of 2, 3, 4 or 8 bits are packed
along tokens (`packing`), so a format that packs holds a multiple of 32 slots. Where half precision is said, float16 or its bits
in uint16: TPU kernels read bits, and XLA copies what it is to reinterpret.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt16

from pallas_kernels.quantized_attention.packing import BLOCK, PLANES
from pallas_kernels.tile_attention.tokens import Along, Mask, Tokens

Pairing = Literal["half", "interleaved"]


@dataclasses.dataclass(frozen=True)
class Scaled:
    """x = code scale. kind: int8, or float8 of 4 exponent and 3 mantissa bits. Arrays: `ScaledArrays`."""

    kind: Literal["int8", "fp8"]


class ScaledArrays(NamedTuple):
    codes: Shaped[Array, "B K S D"]
    scale: Float[Array, "B K S 1"]


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
    """codes: planes of words. scale, zero: half precision."""

    codes: tuple[Shaped[Array, "B K _ D"], ...]
    scale: Shaped[Array, "B K n g"]
    zero: Shaped[Array, "B K n g"]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """x = codebook[code] half + zero, or the number of an outlier. Arrays: `CodebookArrays`."""

    bits: int


class CodebookArrays(NamedTuple):
    """codes: planes of words. codebook: of a head. place, number: channels of a token's outliers, D where there is none, and
    what they are, half precision. by_channel: zero and half range of a channel; by_token: of a token, half precision. Of the
    two there is one."""

    codes: tuple[Shaped[Array, "B K _ D"], ...]
    codebook: Float[Array, "B K c"]
    place: Int[Array, "B K S O"]
    number: Shaped[Array, "B K S O"]
    by_channel: Float[Array, "B K 2 D"] | None = None
    by_token: Shaped[Array, "B K S 2"] | None = None


Format = Scaled | ChannelGroups | TokenGroups | Codebook
Arrays = ScaledArrays | GroupArrays | CodebookArrays


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


class Slots(NamedTuple):
    """tokens: of a key head or of all; segment 0 is empty, and what an empty slot holds is never looked at. used: slots of a
    row behind which all are empty. extra: added to the scores of each slot. cosine, sine: rotate the first 2C channels of raw
    keys."""

    k: Arrays
    v: Arrays
    tokens: Tokens  # [B, K or 1, S]
    used: Int[Array, "B"]
    extra: Float[Array, "B K S"] | None = None
    cosine: Float[Array, "rows S C"] | None = None  # rows: B, or B K
    sine: Float[Array, "rows S C"] | None = None


def channels(arrays: Arrays) -> int:
    """D of an array of codes."""
    return (arrays.codes[0] if isinstance(arrays.codes, tuple) else arrays.codes).shape[-1]


def halves(x: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """Half precision in float32."""
    return (jax.lax.bitcast_convert_type(x, jnp.float16) if x.dtype == jnp.uint16 else x).astype(jnp.float32)


def half_bits(x: Float[Array, "*n"]) -> UInt16[Array, "*n"]:
    """The bits of numbers in half precision, the largest of which stands for all that are larger."""
    most = float(jnp.finfo(jnp.float16).max)
    return jax.lax.bitcast_convert_type(jnp.clip(x, -most, most).astype(jnp.float16), jnp.uint16)


def invalid(plan: Plan, q: Shaped[Array, "B T H D"], slots: Slots) -> str | None:
    """Why a call is none that any form takes, if it is not."""
    B, _, H, D = q.shape
    K, S = jax.tree.leaves(slots.k.codes)[0].shape[1], slots.tokens.index.shape[2]
    if H % K or channels(slots.k) != D:
        return f"queries {q.shape}, {K} key heads of {channels(slots.k)}: expected a multiple of the heads, as wide"
    if slots.tokens.index.shape[:2] not in ((B, 1), (B, K)):
        return f"tokens {slots.tokens.index.shape}: expected [{B}, {K} or 1, slots]"
    if isinstance(plan.values, TokenGroups):
        return f"values = {plan.values}: expected groups of channels"
    for side, form, arrays in (("keys", plan.keys, slots.k), ("values", plan.values, slots.v)):
        if isinstance(form, Scaled):
            continue
        if form.bits not in PLANES or (isinstance(form, Codebook) and form.bits == 8) or S % BLOCK:
            return f"{side} = {form}, {S} slots: expected 2, 3, 4 or 8 bits and a multiple of {BLOCK} slots"
        if isinstance(form, ChannelGroups) and channels(arrays) % form.size:
            return f"{side} = {form}: expected a divisor of {channels(arrays)} channels"
        if isinstance(form, TokenGroups) and S % form.size:
            return f"{side} = {form}: expected a divisor of {S} slots"
    return None
