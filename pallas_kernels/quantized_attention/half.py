"""Half precision by its bits: to TPUs as integers, whose kernels know no such type, to others as what it is."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped, UInt16

from pallas_kernels.target import platform

MOST = float(jnp.finfo(jnp.float16).max)


def halves(bits: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """Half precision, as bits of uint16, in float32."""
    if platform() == "tpu":
        return halves_of(bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)


def half_bits(x: Float[Array, "*n"]) -> UInt16[Array, "*n"]:
    """The bits of numbers in half precision, the largest of which stands for all that are larger."""
    x = jnp.clip(x, -MOST, MOST)
    if platform() == "tpu":
        return bits_of_float(x).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint16)


def halves_of(bits: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """`halves` by integers."""
    bits = bits.astype(jnp.int32)
    x = float_of_bits(bits, exponent=5, mantissa=10)
    return jnp.where(bits & 0x7FFF > 0x7C00, jnp.nan, x)  # so that what is no number is not hidden by its code


def float_of_bits(bits: Int[Array, "*n"], *, exponent: int, mantissa: int) -> Float[Array, "*n"]:
    """A small floating point number in float32; small ones apart, as float32 that small is taken for 0. Never NaN."""
    bias, top = 2 ** (exponent - 1) - 1, exponent + mantissa
    size = bits & ((1 << top) - 1)
    number = lambda x: jax.lax.bitcast_convert_type(x, jnp.float32)
    normal = number((size << (23 - mantissa)) + ((127 - bias) << 23))
    small = size.astype(jnp.float32) * 2.0 ** (1 - bias - mantissa)
    x = jnp.where(size < 1 << mantissa, small, normal)
    return jnp.where(bits & (1 << top) != 0, -x, x)


def bits_of_float(x: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """The bits in half precision of NaN and of float32 that it holds, rounded to nearest, of two as near to the even one. Of
    what is below its normal numbers a sum with 1/2, whose last bit is worth as much as the last of those, makes the bits."""
    word = jax.lax.bitcast_convert_type(x, jnp.int32)
    size = word & 0x7FFFFFFF
    normal = (size - (112 << 23) + 0xFFF + (size >> 13 & 1)) >> 13
    half = jax.lax.bitcast_convert_type(jnp.float32(0.5), jnp.int32)
    small = jax.lax.bitcast_convert_type(jnp.abs(x) + 0.5, jnp.int32) - half
    found = jnp.where(size < 113 << 23, small, normal)
    return jnp.where(size > 0x7F800000, 0x7E00, found) | (word >> 16 & 0x8000)
