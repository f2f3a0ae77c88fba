"""Few bits a number, uniform in groups that each have a scale and a zero point.

    zero = min,   scale = (max - min) / (2^bits - 1),   code = round((x - zero) / scale)

A group is some channels of one token (`ChannelGroups`), or a channel over some tokens (`TokenGroups`: what KIVI, 2024, found of
keys, whose large numbers stand in few channels). `IntGroups` takes the first for both; `KIVI` the second for keys, and holds
the newest tokens in full precision.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt16

from lcx.cache.codecs.codec import Codec, Quantizer
from pallas_kernels.quantized_attention import formats
from pallas_kernels.quantized_attention.coding import Coding, channel, coded, plainly
from pallas_kernels.quantized_attention.formats import each
from pallas_kernels.quantized_attention.half import half_bits, halves
from pallas_kernels.quantized_attention.packing import BLOCK, PLANES, pack, unpack


class Grouped(NamedTuple):
    """Loose codes. scale, zero: of every group, bits of half precision, which is as fine as 2 to 4 bits ask for."""

    codes: UInt8[Array, "B K N D"]
    scale: UInt16[Array, "B K N g"]
    zero: UInt16[Array, "B K N g"]


def limits(low: Float[Array, "*n"], high: Float[Array, "*n"], bits: int) -> tuple[UInt16[Array, "*n"], UInt16[Array, "*n"]]:
    """(scale, zero) of groups with these numbers at the ends, as they are held."""
    return half_bits((high - low) / (2**bits - 1)), half_bits(low)


def uniform(x: Float[Array, "*n"], scale: Float[Array, "..."], zero: Float[Array, "..."], bits: int) -> Float[Array, "*n"]:
    """Codes; scale and zero of each number's group."""
    return jnp.clip(jnp.round((x - zero) / jnp.where(scale == 0, 1, scale)), 0, 2**bits - 1)


def stands_for(codes: UInt8[Array, "*n G"], scale: UInt16[Array, "..."], zero: UInt16[Array, "..."]) -> Float[Array, "*n G"]:
    return codes.astype(jnp.float32) * halves(scale) + halves(zero)


def _spread(parts: Sequence[Array], channel: Int[Array, "..."], size: int) -> Array:
    """What groups of so many channels have, for each of these."""
    total = parts[0]
    for n in range(1, len(parts)):
        total = jnp.where(channel >= n * size, parts[n], total)
    return total


@dataclasses.dataclass(frozen=True)
class ChannelGroups(Quantizer):
    """size: channels of a group, at most all of a head."""

    bits: int
    size: int
    block = BLOCK

    @property
    def coding(self) -> Coding:
        return Coding(self._code, jnp.uint8, self.bits)

    def _code(self, x, by_channel, by_head, axis):
        size, channels = min(self.size, x.shape[axis]), x.shape[axis]
        if channels % size:
            raise ValueError(f"codec.group = {size}: expected a divisor of a head's {channels} channels")
        at, scale, zero = channel(x, axis), [], []
        for n in range(channels // size):  # whole rows: TPUs pad the few channels of a group
            of = (at >= n * size) & (at < (n + 1) * size)
            low, high = (jnp.where(of, x, most) for most in (jnp.inf, -jnp.inf))
            found = limits(low.min(axis=axis, keepdims=True), high.max(axis=axis, keepdims=True), self.bits)
            scale, zero = [*scale, found[0]], [*zero, found[1]]
        spread = lambda parts: _spread([halves(part) for part in parts], at, size)
        return uniform(x, spread(scale), spread(zero), self.bits), [*scale, *zero]

    def loose(self, x, tables=None):
        codes, shared = plainly(self.coding, x)
        half = len(shared) // 2
        return Grouped(codes, jnp.stack(shared[:half], axis=-1), jnp.stack(shared[half:], axis=-1))

    def encode(self, x, tables=None):
        codes, shared = coded(self.coding, x)
        half = len(shared) // 2
        return formats.GroupArrays(codes, shared[:half], shared[half:])

    def value(self, loose, tables=None):
        channels, groups = loose.codes.shape[-1], loose.scale.shape[-1]
        spread = lambda x: _spread([part[..., None] for part in each(x)], jnp.arange(channels), channels // groups)
        return stands_for(loose.codes, spread(loose.scale), spread(loose.zero))

    def tightened(self, loose, tables=None):
        return formats.GroupArrays(pack(loose.codes, self.bits), each(loose.scale), each(loose.zero))

    def loosened(self, codes, tables=None):
        scale, zero = (jnp.stack(x, axis=-1) for x in (codes.scale, codes.zero))
        return Grouped(unpack(codes.codes, self.bits), scale, zero)

    def format(self, codes, tables):
        return formats.ChannelGroups(self.bits, min(self.size, formats.channels(codes))), codes


@dataclasses.dataclass(frozen=True)
class TokenGroups(Quantizer):
    """size: tokens of a group. Loose codes are the numbers themselves: another group would have other ones."""

    bits: int
    size: int
    exact = True

    @property
    def block(self):
        return max(self.size, BLOCK)

    def loose(self, x, tables=None):
        return x.astype(jnp.float32)

    def value(self, loose, tables=None):
        return loose

    def tightened(self, loose, tables=None):
        codes, (scale, zero) = coded(Coding(self._code, jnp.uint8, self.bits, tokens=self.size), loose)
        return formats.GroupArrays(codes, scale, zero)

    def encode(self, x, tables=None):
        return self.tightened(x)

    def _code(self, x, by_channel, by_head, axis):
        found = limits(x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True), self.bits)
        return uniform(x, *map(halves, found), self.bits), list(found)

    def loosened(self, codes, tables=None):
        numbers = unpack(codes.codes, self.bits)
        apart = numbers.reshape(*codes.scale.shape[:-1], self.size, -1)
        return stands_for(apart, codes.scale[..., None, :], codes.zero[..., None, :]).reshape(numbers.shape)

    def format(self, codes, tables):
        return formats.TokenGroups(self.bits, self.size), codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntGroups(Codec):
    """bits: of a number, 1, 2, 3, 4 or 8. group: channels that share a scale and a zero point, at most all
    of a head."""

    bits: int = 4
    group: int = 32

    def validate(self):
        self.check(self.bits in PLANES, "bits", f"one of {', '.join(map(str, PLANES))}")
        self.check(self.group >= 1, "group", "at least 1 channel")

    @property
    def keys(self):
        return ChannelGroups(self.bits, self.group)

    @property
    def values(self):
        return ChannelGroups(self.bits, self.group)

    @classmethod
    def examples(cls):
        return (cls(group=2), cls(bits=8, group=128))


@dataclasses.dataclass(frozen=True, kw_only=True)
class KIVI(Codec):
    """group: tokens of a key's channel, and channels of a value, that share a scale and a zero point. residual: the newest
    tokens in full precision, at least; keys and values leave it together, a group at a time (the authors' values leave it one
    by one, and their keys all at once)."""

    bits: int = 2
    group: int = 32
    residual: int = 128

    def validate(self):
        self.check(self.bits in PLANES, "bits", f"one of {', '.join(map(str, PLANES))}")
        whole = self.group >= 1 and (self.group % BLOCK == 0 or BLOCK % self.group == 0)
        self.check(whole, "group", f"a multiple or a divisor of {BLOCK}")
        self.check(self.residual >= 0, "residual", "0 or more tokens")

    @property
    def keys(self):
        return TokenGroups(self.bits, self.group)

    @property
    def values(self):
        return ChannelGroups(self.bits, self.group)

    @property
    def recent(self):
        return self.residual

    @classmethod
    def examples(cls):
        return (cls(group=2, residual=2), cls(bits=4, group=32, residual=0))
