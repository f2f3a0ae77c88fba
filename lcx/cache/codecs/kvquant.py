"""KVQuant (2024): keys by channel before their rotation, values by token, codes of a codebook, outliers apart.

    z = (upper + lower) / 2,   r = (upper - lower) / 2,   code = nearest of the codebook to (x - z) / r

Of keys, upper and lower are percentiles of each channel, measured beforehand; of values, the largest and smallest of the token
without its outliers. One codebook a layer for keys and one for values: k-means of many (x - z) / r, weighted by the squared
gradient of the loss. Numbers outside, a share of all, are held in half precision with their channel; so are the first tokens,
which much attention goes to. Q-Norm moves what codes stand for to the mean and deviation of what they were made of.

`lcx.inference.calibration` makes the tables. As the authors', but for ranges and outliers of values, which are of one head
(theirs: of all heads of a token), and for how many outliers a token's key may have: as many as its value, the farthest out.
"""

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from lcx.cache.codecs.codec import Codec, Quantizer
from lcx.cache.known import Measured, arrays_of
from pallas_kernels.quantized_attention import formats
from pallas_kernels.quantized_attention.coding import Coding, channel, coded, plainly
from pallas_kernels.quantized_attention.formats import each, paired, places, together
from pallas_kernels.quantized_attention.half import half_bits, halves
from pallas_kernels.quantized_attention.packing import BLOCK, pack, unpack


class Coded(NamedTuple):
    """Loose: arrays [B, K, N, _]; tight: codes are packed, the rest is taken apart (`formats.each`). place, number: channels of
    outliers, one beyond the last where there is none, and what they are. range: zero point and half range of a token, if it has
    its own. Both of half precision, as its bits."""

    codes: Any
    place: Any
    number: Any
    range: Any


def outliers_of(share: float, channels: int) -> int:
    """Outliers on either side of so many channels: those at or beyond the percentiles that cut off half of `share`."""
    return math.floor(share / 2 * (channels - 1)) + 1 if share else 0


def largest(x: Float[Array, "..."], count: int, of: Bool[Array, "..."], axis: int, last: bool = False):
    """(numbers, their channels, where the others are) along an axis, lists of arrays of one each: the largest first, of those
    as large the first channel first, or the last. One after the other: a sort of every token takes a TPU far longer."""
    place, numbers, places = channel(x, axis), [], []
    for _ in range(count):
        left = jnp.where(of, x, -jnp.inf)
        number = left.max(axis=axis, keepdims=True)
        found = of & (left == number)
        if last:
            at = jnp.where(found, place, -1).max(axis=axis, keepdims=True)
        else:
            at = jnp.where(found, place, x.shape[axis]).min(axis=axis, keepdims=True)
        of = of & (place != at)
        numbers, places = [*numbers, number], [*places, at]
    return numbers, places, of


def nearest(x: Float[Array, "..."], codebook: Sequence[Array]) -> Float[Array, "..."]:
    """The index of the codebook's number that is nearest to each; of two the lower."""
    between = [(high + low) / 2 for low, high in itertools.pairwise(codebook)]
    return sum((jnp.where(x > edge, 1.0, 0.0) for edge in between), jnp.zeros(x.shape))


def looked_up(codes: UInt8[Array, "*n D"], codebook: Float[Array, "B K c"]) -> Float[Array, "*n D"]:
    """Numbers of codes, by a tree of choices, bit after bit."""
    level = [codebook[..., n][:, :, None, None] for n in range(codebook.shape[-1])]
    for bit in range(codebook.shape[-1].bit_length() - 1):
        chosen = (codes >> bit) & 1 == 1
        level = [jnp.where(chosen, high, low) for low, high in zip(level[::2], level[1::2], strict=True)]
    return jnp.broadcast_to(level[0], codes.shape)


def _kind(channels: int):
    """The type of a place, one beyond the last channel included."""
    return jnp.uint8 if channels < 256 else jnp.uint16


class _Coder(Quantizer):
    """limits: numbers that a token has of its own as zero point and half range."""

    block = BLOCK
    limits: ClassVar[int] = 0

    def loose(self, x, tables):
        codes, shared = plainly(self.coding, x, *self._known(tables))
        place, number, limits = self._apart(shared)
        like = codes[..., 0]
        place, number = together(place, like).astype(_kind(x.shape[-1])), together(number, like.astype(jnp.uint16))
        return Coded(codes, place, number, jnp.stack(limits, axis=-1) if limits else None)

    def encode(self, x, tables=None):
        codes, shared = coded(self.coding, x, *self._known(tables))
        place, number, limits = self._apart(shared)
        place = [p.astype(_kind(x.shape[-1])) for p in place]
        place = paired(place) if x.shape[-1] < 256 else tuple(place)
        return Coded(codes, place, number, limits or None)

    @property
    def coding(self) -> Coding:
        return Coding(self._code, jnp.uint8, self.bits)

    @abc.abstractmethod
    def _code(self, x, by_channel, by_head, axis):
        """Of a token: places and numbers of its outliers, and its zero point and half range if they are its own."""

    def _apart(self, shared: tuple) -> tuple[tuple, tuple, tuple]:
        """Places, numbers and limits."""
        count = (len(shared) - self.limits) // 2
        return shared[:count], shared[count : 2 * count], shared[2 * count :]

    def _value(self, loose: Coded, z, r, tables):
        x = looked_up(loose.codes, tables["codebook"])
        x = x * tables["scale"][..., None, None] + tables["shift"][..., None, None]
        x = x * r + z
        channel = jnp.arange(x.shape[-1])
        for n in range(loose.place.shape[-1]):
            x = jnp.where(channel == loose.place[..., n : n + 1], halves(loose.number[..., n : n + 1]), x)
        return x

    def tightened(self, loose, tables=None):
        place = paired(each(loose.place)) if loose.place.dtype == jnp.uint8 else each(loose.place)
        limits = None if loose.range is None else each(loose.range)
        return Coded(pack(loose.codes, self.bits), place, each(loose.number), limits)

    def loosened(self, codes, tables=None):
        numbers = unpack(codes.codes, self.bits)
        D, like = numbers.shape[-1], numbers[..., 0]
        place = together(tuple(places(codes.place, D, len(codes.number))), like).astype(_kind(D))
        number = together(codes.number, like.astype(jnp.uint16))
        return Coded(numbers, place, number, None if codes.range is None else jnp.stack(codes.range, axis=-1))

    def format(self, codes, tables):
        """Q-Norm is part of the codebook."""
        codebook = tables["codebook"] * tables["scale"][..., None] + tables["shift"][..., None]
        ranges = jnp.concatenate([*self._ranges(tables)], axis=2) if codes.range is None else None
        arrays = formats.CodebookArrays(codes.codes, codebook, codes.place, codes.number, ranges, codes.range)
        return formats.Codebook(self.bits), arrays


@dataclasses.dataclass(frozen=True)
class Keys(_Coder):
    """tables: upper, lower [B, K, D], codebook [B, K, c], and of Q-Norm scale and shift [B, K]."""

    bits: int
    outliers: float

    def _known(self, tables):
        upper, lower = tables["upper"], tables["lower"]
        return ((upper + lower) / 2, (upper - lower) / 2), each(tables["codebook"])

    def _ranges(self, tables):
        return (x[:, :, None] for x in self._known(tables)[0])

    def _code(self, x, by_channel, by_head, axis):
        z, r = by_channel
        scaled, D = (x - z) / jnp.where(r > 0, r, 1), x.shape[axis]
        most = min(2 * outliers_of(self.outliers, D), D)
        far, place, _ = largest(jnp.abs(scaled) - 1, most, jnp.ones(x.shape, bool), axis)
        at = channel(x, axis)
        number = [half_bits(jnp.where(at == p, x, 0).sum(axis=axis, keepdims=True)) for p in place]
        number = [jnp.where(f > 0, n, 0).astype(n.dtype) for f, n in zip(far, number, strict=True)]
        place = [jnp.where(f > 0, p, D) for f, p in zip(far, place, strict=True)]
        return nearest(scaled, by_head), [*place, *number]

    def value(self, loose, tables):
        return self._value(loose, *self._ranges(tables), tables)


@dataclasses.dataclass(frozen=True)
class Values(_Coder):
    """tables: codebook [B, K, c], and of Q-Norm scale and shift [B, K]."""

    bits: int
    outliers: float
    limits = 2

    def _known(self, tables):
        return (), each(tables["codebook"])

    def _code(self, x, by_channel, by_head, axis):
        D = x.shape[axis]
        side = min(outliers_of(self.outliers, D), D // 2)
        least, low_place, inner = largest(-x, side, jnp.ones(x.shape, bool), axis)
        most, high_place, inner = largest(x, side, inner, axis, last=True)
        low = jnp.where(inner, x, jnp.inf).min(axis=axis, keepdims=True)
        high = jnp.where(inner, x, -jnp.inf).max(axis=axis, keepdims=True)
        if 2 * side >= D:  # nothing is left: what is next to the middle
            low = high = most[-1]
        limits = [half_bits((high + low) / 2), half_bits((high - low) / 2)]
        z, r = map(halves, limits)
        number = [half_bits(n) for n in (*(-n for n in least), *most[::-1])]
        codes = nearest((x - z) / jnp.where(r > 0, r, 1), by_head)
        return codes, [*low_place, *high_place[::-1], *number, *limits]

    def value(self, loose, tables):
        z, r = (halves(loose.range[..., n : n + 1]) for n in (0, 1))
        return self._value(loose, z, r, tables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVQuant(Measured, Codec):
    """calibration: the tables of a model, a file of `experiments.calibrate` or a shipped model's name; "" are none: every
    channel of a key ranges from -8 to 8. bits: 2, 3 or 4. outliers: the share of numbers held apart. codebook: of calibration,
    with Q-Norm (`normed`) or without, or equally spaced. rotated: codes keys after their rotation, as a comparison.
    sinks: first tokens of a row in full precision."""

    MEASURED = ("calibration", "kvquant.npz")
    ARRAYS = "raw/"

    calibration: str = ""
    bits: Literal[2, 3, 4] = 3
    outliers: float = 0.01
    codebook: Literal["learned", "normed", "uniform"] = "learned"
    rotated: bool = False
    sinks: int = 1

    def validate(self):
        self.check(0 <= self.outliers < 0.5, "outliers", "a share of at least 0 and below 0.5")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")
        known = self.calibration or self.codebook == "uniform"
        self.check(
            bool(known),
            "calibration",
            "a file of experiments.calibrate, or the name of a shipped one, beside a learned codebook",
        )

    @property
    def keys(self):
        return Keys(self.bits, self.outliers)

    @property
    def values(self):
        return Values(self.bits, self.outliers)

    @property
    def raw(self):
        return not self.rotated

    @property
    def first(self):
        return self.sinks

    @property
    def by_layer(self):
        return bool(self.calibration)

    def tables(self, layer, kv_heads, head_dim, value_dim):
        wide = functools.partial(np.full, (kv_heads, head_dim))
        even = np.broadcast_to(np.linspace(-1, 1, 2**self.bits, dtype=np.float32), (kv_heads, 2**self.bits))
        plain = {"codebook": even, "scale": np.ones(kv_heads, np.float32), "shift": np.zeros(kv_heads, np.float32)}
        if not self.calibration:
            return plain | {"upper": wide(np.float32(8)), "lower": wide(np.float32(-8))}, dict(plain)
        held, kind = arrays_of(self), "rotated" if self.rotated else "raw"
        sides = []
        for side, ranges in ((kind, ("upper", "lower")), ("values", ())):
            at = f"{side}/{self.outliers:g}"
            tables = dict(plain)
            for name in ranges:
                tables[name] = self._table(held, f"{at}/{name}", layer, (kv_heads, head_dim))
            if self.codebook != "uniform":
                made = self._table(held, f"{at}/{self.bits}/codebook", layer, (2**self.bits,))
                tables["codebook"] = np.broadcast_to(made, even.shape)
            if self.codebook == "normed":
                norm = self._table(held, f"{at}/{self.bits}/norm", layer, (2,))
                tables |= {name: np.full(kv_heads, n, np.float32) for name, n in zip(("scale", "shift"), norm, strict=True)}
            sides.append(tables)
        return tuple(sides)

    def _table(self, held: dict[str, np.ndarray], name: str, layer: int, shape: tuple[int, ...]) -> np.ndarray:
        if name not in held:
            made = sorted({tuple(key.split("/")[:2]) for key in held if key.count("/") >= 2})
            self.fail(
                "outliers", self.outliers, f"one that {self.calibration} was made for: {', '.join(f'{s} {o}' for s, o in made)}"
            )
        if layer >= len(held[name]) or held[name].shape[1:] != shape:
            found = f"{len(held[name])} layers of {held[name].shape[1:]}"
            self.fail("calibration", self.calibration, f"tables of this model, {shape} of layer {layer}, not {found}")
        return held[name][layer]

    @classmethod
    def examples(cls):
        return (
            cls(codebook="uniform"),
            cls(codebook="uniform", bits=2, outliers=0.2, sinks=2),
            cls(codebook="uniform", outliers=0.0),
        )
