"""Eight bits a number with one scale a token and head: integers, or floating point of 4 exponent and 3 mantissa bits.

scale = max |x| / largest,   code = x / scale, rounded to what the type holds
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.codecs.codec import Codec, Quantizer
from pallas_kernels.quantized_attention import formats
from pallas_kernels.quantized_attention.coding import Coding, coded, plainly

LARGEST = {"int8": 127.0, "fp8": 448.0}


@dataclasses.dataclass(frozen=True)
class ByToken(Quantizer):
    """kind: of a code."""

    kind: Literal["int8", "fp8"]

    @property
    def coding(self) -> Coding:
        return Coding(self._code, {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}[self.kind])

    def _code(self, x, by_channel, by_head, axis):
        most = LARGEST[self.kind]
        scale = jnp.abs(x).max(axis=axis, keepdims=True) / most
        codes = jnp.clip(x / jnp.where(scale == 0, 1, scale), -most, most)
        return jnp.round(codes) if self.kind == "int8" else codes, [scale]

    def loose(self, x, tables=None):
        codes, (scale,) = plainly(self.coding, x)
        return formats.ScaledArrays(codes, scale)

    def encode(self, x, tables=None):
        codes, (scale,) = coded(self.coding, x)
        return formats.ScaledArrays(codes, scale)

    def value(self, loose, tables=None):
        numbers = loose.codes.astype(jnp.float32) if self.kind == "int8" else widened(loose.codes)
        return numbers * loose.scale[..., None]

    def format(self, codes, tables):
        return formats.Scaled(self.kind), codes


def widened(codes: Array) -> Float[Array, "*n"]:
    """E4M3 in float32, by its bits in a float16 of the same mantissa, 2^8 too small: what XLA converts by branches on a CPU."""
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.uint16)
    halves = jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16)
    return halves.astype(jnp.float32) * 256


class _Scaled(Codec):
    @property
    def keys(self):
        return ByToken(self.kind)

    @property
    def values(self):
        return ByToken(self.kind)

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(_Scaled):
    kind = "int8"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(_Scaled):
    """E4M3: no infinity, largest 448."""

    kind = "fp8"
