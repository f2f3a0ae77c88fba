"""Codes of 1, 2, 3, 4 or 8 bits, packed along tokens into 32-bit words, a block of 32 tokens at a time.

A width is a sum of planes, each a divisor of 32: 3 bits are a plane of 2 (the low bits) and a plane of 1. In a plane of w bits
a block of 32 tokens fills w words a channel; bit field j of word r is token j w + r of the block. So unpacking is a shift and a
mask of whole words, channels stay where they lie, and 3 bits take 3 bits.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

from pallas_kernels.quantized_attention import packing_tpu
from pallas_kernels.quantized_attention.packing_tpu import BLOCK
from pallas_kernels.target import on_one_device, platform

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def pack(codes: UInt8[Array, "*n T D"], bits: int) -> tuple[UInt32[Array, "*n _ D"], ...]:
    """One array of words [*n, T / 32 x width, D] a plane. Raises ValueError unless T is a multiple of 32."""
    *lead, tokens, channels = codes.shape
    if tokens % BLOCK or bits not in PLANES:
        raise ValueError(
            f"pack: {tokens} tokens of {bits} bits: expected a multiple of {BLOCK}, of {', '.join(map(str, PLANES))}"
        )
    if _on_tpu(tokens, channels):
        return packing_tpu.pack(codes, PLANES[bits])
    packed, below = [], 0
    for width in PLANES[bits]:
        fields = (codes >> below) & ((1 << width) - 1)
        fields = fields.astype(jnp.uint32).reshape(*lead, tokens // BLOCK, BLOCK // width, width, channels)
        place = jnp.arange(BLOCK // width, dtype=jnp.uint32)[:, None, None] * width
        words = (fields << place).sum(axis=-3, dtype=jnp.uint32)  # no two fields share a bit
        packed.append(words.reshape(*lead, tokens // BLOCK * width, channels))
        below += width
    return tuple(packed)


def unpack(planes: tuple[UInt32[Array, "*n _ D"], ...], bits: int) -> UInt8[Array, "*n T D"]:
    """Inverse of `pack`."""
    *_, rows, channels = planes[0].shape
    if _on_tpu(rows // PLANES[bits][0] * BLOCK, channels):
        return packing_tpu.unpack(tuple(planes), PLANES[bits])
    codes, below = None, 0
    for width, words in zip(PLANES[bits], planes, strict=True):
        *lead, rows, channels = words.shape
        words = words.reshape(*lead, rows // width, 1, width, channels)
        place = jnp.arange(BLOCK // width, dtype=jnp.uint32)[:, None, None] * width
        fields = ((words >> place) & ((1 << width) - 1)).astype(jnp.uint8)
        fields = fields.reshape(*lead, rows // width * BLOCK, channels) << below
        codes, below = fields if codes is None else codes | fields, below + width
    return codes


def _on_tpu(tokens: int, channels: int) -> bool:
    """Whether a kernel does it."""
    return platform() == "tpu" and on_one_device() and packing_tpu.taken(tokens, channels)
