"""Coded slots in a TPU kernel: which arrays of a format it is given, and products of queries and codes in vector memory.

A tile is bk slots of all key heads. What a token has of its own (scales, outliers) comes as arrays [B, K, S], tokens along
lanes, and is made float32 once a tile, each in K rows of `own`. Words of packed codes are unpacked a token of every block of 32
at a time, in strides of the words, and written in strides to a tile of float32 in the order of tokens.
Scales and zero points of a token are no part of a number: the queries times the codes are scaled, of each group of channels,
and so are the probabilities before they meet the codes of values. With z the zero point of group g:
    q . k = sum_g scale_g (q_g . code_g) + z_g sum(q_g),   p v = [(p scale_g) code_g + p . z_g] for g
Raw keys are whole numbers before they are turned: q . R k = q . (k cosine) + q' . (k sine) with q' as in `reference.partners`.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.quantized_attention.formats import (
    Arrays,
    ChannelGroups,
    Codebook,
    Format,
    Numbers,
    Scaled,
    TokenGroups,
    channels,
    places,
)
from pallas_kernels.quantized_attention.half import float_of_bits, halves_of
from pallas_kernels.quantized_attention.packing import BLOCK, PLANES
from pallas_kernels.tile_attention.scores import dot
from pallas_kernels.tpu_chips import LANES


class Operand(NamedTuple):
    """axis: along which slots lie, None if none do."""

    array: Shaped[Array, "..."]
    axis: int | None = None


def by_token(form: Format) -> bool:
    return isinstance(form, Scaled | ChannelGroups)


def groups(form: Format, width: int) -> int:
    """Of channels that have a scale of their own."""
    return width // form.size if isinstance(form, ChannelGroups) else 1


def operands(form: Format, arrays: Arrays) -> dict[str, Operand]:
    """What a kernel is given of one side."""
    given = {f"own{n}": Operand(x, 2) for n, x in enumerate(_own(form, arrays))}
    if isinstance(form, Numbers | Scaled):
        return given | {"codes": Operand(arrays.codes, 2)}
    given |= {f"plane{n}": Operand(words, 2) for n, words in enumerate(arrays.codes)}
    if isinstance(form, Codebook):
        given["codebook"] = Operand(jnp.broadcast_to(arrays.codebook[..., None], (*arrays.codebook.shape, LANES)))
        if arrays.by_channel is not None:
            given["by_channel"] = Operand(arrays.by_channel.astype(jnp.float32))
    elif isinstance(form, TokenGroups):
        given |= {"scale": Operand(arrays.scale, 2), "zero": Operand(arrays.zero, 2)}
    return given


def _own(form: Format, arrays: Arrays) -> list[Shaped[Array, "B K S"]]:
    """What a token has of its own: scales and zero points of groups; or places and numbers of outliers, zero and half range."""
    if isinstance(form, Scaled):
        return [arrays.scale]
    if isinstance(form, Codebook):
        return [*arrays.place, *arrays.number, *(arrays.by_token or ())]
    return [*arrays.scale, *arrays.zero] if isinstance(form, ChannelGroups) else []


def scratch(form: Format, arrays: Arrays, bk: int, turned: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of arrays that a side needs beside its operands, of float32, and of words of int32; turned: of rotated keys."""
    D, own = channels(arrays), _own(form, arrays)
    several = len(own) + (len(arrays.number) - len(arrays.place) if isinstance(form, Codebook) else 0)
    needed = {} if isinstance(form, Numbers | Scaled) else {"wide": (D // LANES * bk, LANES)}
    if needed and D > LANES:
        needed |= {f"words{n}": (bk // BLOCK * width, LANES) for n, width in enumerate(PLANES[form.bits])}
    if isinstance(form, TokenGroups) and form.size > BLOCK:
        needed |= dict.fromkeys(("scales", "zeros"), (D // LANES * bk // BLOCK, LANES))
    if own:
        needed["own"] = (several * own[0].shape[1], bk)
    rows = 1 if isinstance(form, Numbers) else several if turned or isinstance(form, Codebook) else 0
    return needed | ({"rows": (-(-rows // 8) * 8, bk)} if rows else {})


def prepare(form: Format, refs: SimpleNamespace) -> None:
    """What tokens of a tile have of their own, in float32, as many rows of each as there are heads."""
    if not refs.owned:
        return
    held, K = [ref[...] for ref in refs.owned], refs.owned[0].shape[0]
    if isinstance(form, Codebook):
        many, D = _outliers(refs), refs.plane0.shape[-1]
        words = len(held) - many - (2 if refs.by_channel is None else 0)
        rows = [x.astype(jnp.float32) for x in places([x.astype(jnp.int32) for x in held[:words]], D, many)]
        held = held[words:]
    else:
        rows = []
    rows += [x if x.dtype == jnp.float32 else halves_of(x) for x in held]
    for n, x in enumerate(rows):
        refs.own[n * K : (n + 1) * K, :] = x


def _outliers(refs: SimpleNamespace) -> int:
    """Of a token, of a codebook."""
    rows = refs.own.shape[0] // refs.owned[0].shape[0] if refs.owned else 0
    return (rows - (2 if refs.by_channel is None else 0)) // 2


def _own_rows(refs: SimpleNamespace, h: Any, there: Bool[Array, "1 _"]) -> list[Float[Array, "1 bk"]]:
    """Of a head, 0 of what may be anything."""
    if not refs.owned:
        return []
    K = refs.owned[0].shape[0]
    return [jnp.where(there, refs.own[pl.ds(n * K + h, 1), :], 0) for n in range(refs.own.shape[0] // K)]


def key_scores(form: Format, refs: SimpleNamespace, h: Any, q: Shaped[Array, "rows D"], R: int) -> Float[Array, "R bk"]:
    """q . k. q: R rows for each group of channels, 0 elsewhere; or those and their partners, for keys that are turned."""
    there = jnp.ones((1, 1), jnp.int32) != 0  # a score of an empty slot is hidden, whatever it is
    if refs.turn is not None:
        k, (cosine, sine) = _numbers(form, refs, h, there), refs.turn(h)
        return dot(q[:R], (k * cosine).astype(q.dtype), 1, 1) + dot(q[R:], (k * sine).astype(q.dtype), 1, 1)
    if not by_token(form):
        return dot(q, _numbers(form, refs, h, there).astype(q.dtype), 1, 1)
    found = dot(q, _codes(form, refs, h).astype(q.dtype), 1, 1)
    scale, zero = _scales(form, refs, h, there)
    total = 0
    for g in range(len(scale)):
        total += found[g * R : (g + 1) * R] * scale[g]
        if zero:
            total += q[g * R : (g + 1) * R].astype(jnp.float32).sum(axis=1, keepdims=True) * zero[g]
    return total


def value_sums(
    form: Format, refs: SimpleNamespace, h: Any, p: Float[Array, "R bk"], there: Bool[Array, "1 bk"], dtype: Any
) -> Float[Array, "R E"]:
    """p v, products in a dtype. Numbers of empty slots, which may be NaN, are taken for 0."""
    if not by_token(form):
        return dot(p.astype(dtype), _numbers(form, refs, h, there).astype(dtype), 1, 0)
    scale, zero = _scales(form, refs, h, there)
    R, codes = len(p), _codes(form, refs, h).astype(dtype)
    scaled = jnp.concatenate([p * row for row in scale], axis=0).astype(dtype)
    found = dot(scaled, codes, 1, 0)
    group = jax.lax.broadcasted_iota(jnp.int32, (R, codes.shape[1]), 1) // (codes.shape[1] // len(scale))
    total = jnp.zeros((R, codes.shape[1]), jnp.float32)
    for g in range(len(scale)):
        part = found[g * R : (g + 1) * R]
        if zero:
            part += (p * zero[g]).sum(axis=1, keepdims=True)
        total = jnp.where(group == g, part, total)
    return total


def _numbers(form: Format, refs, h, there: Bool[Array, "1 _"]) -> Float[Array, "bk D"]:
    """What codes stand for, in float32."""
    if isinstance(form, Numbers):
        some = there if there.shape == (1, 1) else _columns(refs, [there.astype(jnp.float32)])[:, :1] != 0
        return jnp.where(some, refs.codes[h].astype(jnp.float32), 0)
    if isinstance(form, TokenGroups):
        scale, zero = (_every_block(getattr(refs, name), h, kept) for name, kept in _kept(form, refs))
        return _unpacked(form, refs, h, lambda code, lanes: code.astype(jnp.float32) * scale[:, lanes] + zero[:, lanes])
    if isinstance(form, Codebook):
        return _looked_up(form, refs, h, there)
    x = _codes(form, refs, h)
    scale, zero = _scales(form, refs, h, there)
    columns = _columns(refs, [*scale, *zero])
    n, group = len(scale), jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) // (x.shape[1] // len(scale))
    total = jnp.zeros(x.shape, jnp.float32)
    for g in range(n):
        part = x * columns[:, g : g + 1]
        total = jnp.where(group == g, part + columns[:, n + g : n + g + 1] if zero else part, total)
    return total


def _codes(form: Format, refs, h) -> Float[Array, "bk D"]:
    if not isinstance(form, Scaled):
        return _unpacked(form, refs, h, lambda code, lanes: code.astype(jnp.float32))
    if form.kind == "int8":
        return refs.codes[h].astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(refs.codes[h], jnp.int8).astype(jnp.int32)
    return float_of_bits(bits, exponent=4, mantissa=3)


def _unpacked(form, refs, h, number) -> Float[Array, "bk D"]:
    """number(code, lanes) of every code, in the order of tokens; the t-th tokens of all blocks at a time, [bk / 32, lanes]."""
    for n in range(refs.plane0.shape[-1] // LANES):
        _unpack_lanes(form, refs, h, n, functools.partial(number, lanes=slice(n * LANES, (n + 1) * LANES)))
    return _side_by_side(refs.wide, refs.plane0.shape[-1] // LANES)


def _unpack_lanes(form, refs, h, part: int, number) -> None:
    """Strides are of arrays of 128 lanes: of wider ones the words are copied first."""
    bk = refs.wide.shape[0] // (refs.plane0.shape[-1] // LANES)
    blocks, words, planes = bk // BLOCK, {}, []
    for n in range(len(PLANES[form.bits])):
        ref, own = getattr(refs, f"plane{n}"), getattr(refs, f"words{n}")
        if own is not None:
            own[...] = jax.lax.bitcast_convert_type(ref[h, :, part * LANES : (part + 1) * LANES], jnp.int32)
        planes.append(functools.partial(_strided, ref, h) if own is None else functools.partial(_strided, own, None))
    for t in range(BLOCK):
        code, below = None, 0
        for n, width in enumerate(PLANES[form.bits]):
            place, row = divmod(t, width)
            if (n, row) not in words:
                words[n, row] = planes[n](pl.ds(row, blocks, width))
            field = jax.lax.shift_right_logical(words[n, row], jnp.int32(place * width)) & ((1 << width) - 1)
            code, below = field if code is None else code | field << below, below + width
        refs.wide[pl.ds(part * bk + t, blocks, BLOCK), :] = number(code)


def _strided(ref, h, rows) -> Int[Array, "blocks lanes"]:
    return ref[rows, :] if h is None else jax.lax.bitcast_convert_type(ref[h, rows, :], jnp.int32)


def _looked_up(form: Codebook, refs, h, there) -> Float[Array, "bk D"]:
    """By a tree of choices, bit after bit; then outliers in their channels."""
    book = [refs.codebook[h, n : n + 1, :1] for n in range(2**form.bits)]

    def number(code, lanes):
        level = book
        for bit in range(form.bits):
            chosen = code & (1 << bit) != 0
            level = [jnp.where(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
        if refs.by_channel is None:
            return level[0]
        return level[0] * refs.by_channel[h, 1:2, lanes] + refs.by_channel[h, 0:1, lanes]

    x, rows, many = _unpacked(form, refs, h, number), _own_rows(refs, h, there), _outliers(refs)
    if not rows:
        return x
    columns = _columns(refs, rows)
    if refs.by_channel is None:
        x = x * columns[:, 2 * many + 1 : 2 * many + 2] + columns[:, 2 * many : 2 * many + 1]
    channel = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1).astype(jnp.float32)
    for n in range(many):
        x = jnp.where(channel == columns[:, n : n + 1], columns[:, many + n : many + n + 1], x)
    return x


def _scales(form: Format, refs, h, there) -> tuple[list[Float[Array, "1 bk"]], list[Float[Array, "1 bk"]]]:
    """(scales, zero points or none) of groups of channels."""
    rows = _own_rows(refs, h, there)
    half = len(rows) if isinstance(form, Scaled) else len(rows) // 2
    return rows[:half], rows[half:]


def _kept(form: TokenGroups, refs):
    return (("scale", refs.scales), ("zero", refs.zeros)) if form.size > BLOCK else (("scale", None), ("zero", None))


def _every_block(ref, h, kept) -> Float[Array, "blocks D"]:
    """Of groups of tokens, for every block of them."""
    found = halves_of(ref[h])
    if kept is None:
        return found
    parts = found.shape[1] // LANES
    rows = kept.shape[0] // parts
    each = rows // len(found)
    for part in range(parts):
        for n in range(each):
            kept[pl.ds(part * rows + n, len(found), each), :] = found[:, part * LANES : (part + 1) * LANES]
    return _side_by_side(kept, parts)


def _side_by_side(ref, parts: int) -> Float[Array, "rows D"]:
    """What lies in parts of 128 lanes, one below the other."""
    rows = ref.shape[0] // parts
    return jnp.concatenate([ref[part * rows : (part + 1) * rows, :] for part in range(parts)], axis=1)


def _columns(refs, rows: list[Float[Array, "1 bk"]]) -> Float[Array, "bk columns"]:
    """Rows side by side as columns."""
    for n, row in enumerate(rows):
        refs.rows[n : n + 1] = row
    return refs.rows[...].T
