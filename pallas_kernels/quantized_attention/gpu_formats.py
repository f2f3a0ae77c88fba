"""Coded slots in a GPU kernel: what the codes of some slots stand for, in registers.

References are of one row and key head, named as the fields of a format's arrays. Words are turned into codes by shifts of whole
words, broadcast over the bit fields; reshapes put them in the order of tokens.
"""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from pallas_kernels.quantized_attention.formats import (
    Arrays,
    ChannelGroups,
    Codebook,
    Format,
    Numbers,
    Pairing,
    Scaled,
    TokenGroups,
    places,
)
from pallas_kernels.quantized_attention.half import halves
from pallas_kernels.quantized_attention.packing import BLOCK, PLANES


def operands(form: Format, arrays: Arrays) -> dict[str, tuple[Shaped[Array, "B K n ..."], bool]]:
    """Arrays by name, and whether slots lie along n. own: what a token has of its own, in the order of the fields."""
    if isinstance(form, Numbers):
        return {"codes": (arrays.codes, True)}
    if isinstance(form, Scaled):
        codes = arrays.codes if form.kind == "int8" else jax.lax.bitcast_convert_type(arrays.codes, jnp.uint8)
        return {"codes": (codes, True), "own0": (arrays.scale, True)}
    given = {f"plane{n}": (words, True) for n, words in enumerate(arrays.codes)}
    if isinstance(form, TokenGroups):
        return given | {"scale": (arrays.scale, True), "zero": (arrays.zero, True)}
    if isinstance(form, ChannelGroups):
        own = [*arrays.scale, *arrays.zero]
    else:
        own = [*arrays.place, *arrays.number, *(arrays.by_token or ())]
        given["codebook"] = (arrays.codebook, False)
        if arrays.by_channel is not None:
            given["by_channel"] = (arrays.by_channel, False)
    return given | {f"own{n}": (x, True) for n, x in enumerate(own)}


def numbers(form: Format, refs: SimpleNamespace, start: Any, bk: int, D: int) -> Float[Array, "bk D"]:
    """Of bk slots from `start` on, in float32."""
    slots = pl.ds(start, bk)
    if isinstance(form, Numbers):
        return refs.codes[slots, :].astype(jnp.float32)
    if isinstance(form, Scaled):
        codes = refs.codes[slots, :]
        x = codes.astype(jnp.float32) if form.kind == "int8" else _e4m3(codes)
        return x * refs.own[0][slots][:, None]
    codes = _unpacked(form, refs, start, bk, D)
    if isinstance(form, Codebook):
        return _looked_up(form, refs, codes, slots)
    if isinstance(form, ChannelGroups):
        half = len(refs.own) // 2
        scale, zero = (_by_group(own, slots, form.size) for own in (refs.own[:half], refs.own[half:]))
        return codes.astype(jnp.float32) * scale + zero
    if form.size >= bk:
        spread = lambda ref: halves(ref[jax.lax.div(start, jnp.int32(form.size)), :])[None, :]
    else:
        some = pl.ds(jax.lax.div(start, jnp.int32(form.size)), bk // form.size)
        spread = lambda ref: _repeated(halves(ref[some, :])[:, None, :], (bk // form.size, form.size, D), (bk, D))
    return codes.astype(jnp.float32) * spread(refs.scale) + spread(refs.zero)


def table(ref: Any, start: Any, bk: int, D: int, pairing: Pairing) -> Float[Array, "bk D"]:
    """Of cosines or sines, a channel each; of pairs where they are as many as half the channels."""
    x = ref[pl.ds(start, bk), :].astype(jnp.float32)
    if x.shape[1] == D:
        return x
    return (
        _repeated(x[:, None, :], (bk, 2, D // 2), (bk, D))
        if pairing == "half"
        else _repeated(x[:, :, None], (bk, D // 2, 2), (bk, D))
    )


def _unpacked(form: ChannelGroups | TokenGroups | Codebook, refs, start, bk: int, D: int):
    blocks, codes, below = bk // BLOCK, None, 0
    for n, width in enumerate(PLANES[form.bits]):
        first = jax.lax.div(start, jnp.int32(BLOCK)) * width
        words = getattr(refs, f"plane{n}")[pl.ds(first, blocks * width), :]
        words = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(blocks, 1, width, D)
        shape = blocks, BLOCK // width, width, D
        place = jnp.broadcast_to((jnp.arange(BLOCK // width, dtype=jnp.int32) * width)[None, :, None, None], shape)
        fields = jax.lax.shift_right_logical(jnp.broadcast_to(words, shape), place) & ((1 << width) - 1)
        fields = fields.reshape(bk, D)
        codes, below = fields if codes is None else codes | fields << below, below + width
    return codes


def _looked_up(form: Codebook, refs, codes, slots):
    level = [refs.codebook[n] for n in range(2**form.bits)]
    for bit in range(form.bits):
        chosen = (codes & (1 << bit)) != 0
        level = [jnp.where(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    if refs.by_channel is not None:
        x = level[0] * refs.by_channel[1, :][None, :] + refs.by_channel[0, :][None, :]
    else:
        zero, half = (halves(ref[slots])[:, None] for ref in refs.own[-2:])
        x = level[0] * half + zero
    D, rest = codes.shape[1], len(refs.own) - (2 if refs.by_channel is None else 0)
    words = rest - (2 * rest // 3 if D < 256 else rest // 2)  # of so many outliers and their places, which may be paired
    channel = jnp.arange(D, dtype=jnp.int32)[None, :]
    place = places([ref[slots].astype(jnp.int32) for ref in refs.own[:words]], D, rest - words)
    for one, number in zip(place, refs.own[words:rest], strict=True):
        x = jnp.where(channel == one[:, None], halves(number[slots])[:, None], x)
    return x


def _by_group(own: list, slots, size: int) -> Float[Array, "bk D"]:
    """Numbers of groups of `size` channels, for each of them."""
    group = jnp.arange(len(own) * size, dtype=jnp.int32)[None, :] // size
    total = halves(own[0][slots])[:, None]
    for n in range(1, len(own)):
        total = jnp.where(group == n, halves(own[n][slots])[:, None], total)
    return total


def _e4m3(codes: Shaped[Array, "bk D"]) -> Float[Array, "bk D"]:
    """By its bits in a float16 of the same mantissa, 2^8 too small, which hold small numbers too."""
    bits = codes.astype(jnp.int32)
    halves = jax.lax.bitcast_convert_type(((bits & 0x80) << 8 | (bits & 0x7F) << 7).astype(jnp.uint16), jnp.float16)
    return halves.astype(jnp.float32) * 256


def _repeated(x, shape: tuple[int, ...], flat: tuple[int, int]):
    return jnp.broadcast_to(x, shape).reshape(flat)
