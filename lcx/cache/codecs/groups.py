"""Few bits a number, uniform in groups that each have a scale and a zero point.

    zero = min,   scale = (max - min) / (2^bits - 1),   code = round((x - zero) / scale)

A group is some channels of one token (`ChannelGroups`), or a channel over some tokens (`TokenGroups`: what KIVI, 2024, found of
keys, whose large numbers stand in few channels). `IntGroups` takes the first for both; `KIVI` the second for keys, and holds
the newest tokens in full precision.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8, UInt16

from lcx.cache.codecs.codec import Codec, Quantizer
from pallas_kernels.quantized_attention import formats
from pallas_kernels.quantized_attention.formats import each, half_bits, halves
from pallas_kernels.quantized_attention.packing import BLOCK, PLANES, pack, unpack


class Grouped(NamedTuple):
    """Loose codes. scale, zero: of every group, bits of half precision, which is as fine as 2 to 4 bits ask for."""

    codes: UInt8[Array, "B K N D"]
    scale: UInt16[Array, "B K N g"]
    zero: UInt16[Array, "B K N g"]


def uniform(x: Float[Array, "*n G"], bits: int) -> tuple[UInt8[Array, "*n G"], UInt16[Array, "*n 1"], UInt16[Array, "*n 1"]]:
    """(codes, scale, zero) of groups along the last axis, the last two as they are held."""
    x = x.astype(jnp.float32)
    low, high = x.min(axis=-1, keepdims=True), x.max(axis=-1, keepdims=True)
    zero, scale = half_bits(low), half_bits((high - low) / (2**bits - 1))
    step = jnp.where(scale == 0, 1, halves(scale))
    codes = jnp.clip(jnp.round((x - halves(zero)) / step), 0, 2**bits - 1)
    return codes.astype(jnp.uint8), scale, zero


def stands_for(codes: UInt8[Array, "*n G"], scale: UInt16[Array, "..."], zero: UInt16[Array, "..."]) -> Float[Array, "*n G"]:
    return codes.astype(jnp.float32) * halves(scale) + halves(zero)


@dataclasses.dataclass(frozen=True)
class ChannelGroups(Quantizer):
    """size: channels of a group, at most all of a head."""

    bits: int
    size: int
    block = BLOCK

    def loose(self, x, tables=None):
        size = min(self.size, x.shape[-1])
        if x.shape[-1] % size:
            raise ValueError(f"codec.group = {size}: expected a divisor of a head's {x.shape[-1]} channels")
        codes, scale, zero = uniform(x.reshape(*x.shape[:-1], -1, size), self.bits)
        return Grouped(codes.reshape(x.shape), scale[..., 0], zero[..., 0])

    def value(self, loose, tables=None):
        apart = loose.codes.reshape(*loose.scale.shape, -1)
        return stands_for(apart, loose.scale[..., None], loose.zero[..., None]).reshape(loose.codes.shape)

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

    @property
    def block(self):
        return max(self.size, BLOCK)

    def loose(self, x, tables=None):
        return x.astype(jnp.float32)

    def value(self, loose, tables=None):
        return loose

    def tightened(self, loose, tables=None):
        *lead, tokens, channels = loose.shape
        groups = jnp.moveaxis(loose.reshape(*lead, tokens // self.size, self.size, channels), -2, -1)
        codes, scale, zero = uniform(groups, self.bits)
        codes = jnp.moveaxis(codes, -1, -2).reshape(loose.shape)
        return formats.GroupArrays(pack(codes, self.bits), scale[..., 0], zero[..., 0])

    def loosened(self, codes, tables=None):
        numbers = unpack(codes.codes, self.bits)
        apart = numbers.reshape(*codes.scale.shape[:-1], self.size, -1)
        return stands_for(apart, codes.scale[..., None, :], codes.zero[..., None, :]).reshape(numbers.shape)

    def format(self, codes, tables):
        return formats.TokenGroups(self.bits, self.size), codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntGroups(Codec):
    """bits: of a number, 2, 3, 4 or 8. group: channels that share a scale and a zero point, at most all
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
