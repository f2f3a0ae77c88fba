"""Calibration of KVQuant (2024): what its codec has to know beforehand of a model's keys and values.

Texts are read once, keys raw, with a tap that adds nothing to every key and value: the gradient of the loss by it, squared, is
the weight of that number (the diagonal of the Fisher information). Then, for each layer and share of outliers,

    upper, lower     percentiles of each channel of keys that leave half of the outliers beyond each
    codebook         k-means of (x - z) / r of what is no outlier, weighted, for each number of bits
    norm             scale and shift by which codes get the mean and deviation of what they stand for (Q-Norm)

The first `sinks` tokens of a text are left out, as they are never coded. Tables are also made of rotated keys, to compare with.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.batch import Batch, causal_info
from lcx.cache.codecs.kvquant import Values
from lcx.cache.dense import DenseCache, DenseState
from lcx.cache.known import MODEL
from lcx.inference.forward import logprobs_of
from lcx.inference.reading import padded_rows
from lcx.mixers.attention import Attention
from lcx.models.decoder import DecoderModel, rebuild
from lcx.models.words import words
from lcx.positions.frequencies import Frequencies
from lcx.positions.rotate import rotate
from lcx.record import record, replaced
from lcx.spec import SpecError, edit, edits
from pallas_kernels.quantized_attention.half import halves

ROUNDS = 50  # of k-means, at most


@record
class Tapped:
    """held: keys and values. k, v: what is added to them."""

    held: DenseState
    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K E"]


class Around:
    """Before a cache whose state is the field `held` of a state that has more."""

    def length(self, state):
        return super().length(getattr(state, "held", state))

    def append(self, state, *new):
        return dataclasses.replace(state, held=super().append(state.held, *new))

    def placed(self, state, rules):
        return state


class _Tap(Around, DenseCache):
    """A dense cache of raw keys with something added to what it holds."""

    def init(self, *sizes, **options):
        held = super().init(*sizes, **options)
        return Tapped(held=held, k=held.k, v=held.v)

    def attend(self, state, *query, **options):
        held = dataclasses.replace(state.held, k=state.held.k + state.k, v=state.held.v + state.v)
        return super().attend(held, *query, **options)


def tables(
    model: DecoderModel,
    rows: Sequence[Sequence[int]],
    *,
    outliers: Sequence[float] = (0.0, 0.01),
    bits: Sequence[int] = (2, 3, 4),
    sinks: int = 1,
    at_once: int = 2,
) -> dict[str, np.ndarray]:
    """By name `<raw, rotated or values>/<outliers>/...`: upper, lower [L, K, D], <bits>/codebook [L, 2^bits] and
    <bits>/norm [L, 2]; and `model`, what tells whose they are.

    rows: texts of one length, in ids, read `at_once`, or as many as the ambient mesh shares out. Raises SpecError for a model
    that has another mixer than plain attention in some layer.
    """
    spec = model.spec
    for n, layer in enumerate(spec.pattern):
        if type(layer.mixer) is not Attention or layer.mixer.distances is not None or spec.memory is not None:
            raise SpecError(f"model.pattern[{n}].mixer: expected plain attention, without a distance plan or model.memory")
        spec = edit(spec, f"pattern[{n}].mixer.cache", _Tap(keys="raw"))
    tapped = rebuild(model, edits(spec, [("compute", "float32"), ("rules.slots", ())]))  # keys split would have no gradient
    seen = in_parts(_read, tapped, rows, at_once)
    made: dict[str, list[np.ndarray]] = {}
    for layer in range(spec.depth):
        period, slot = divmod(layer, len(spec.pattern))
        k, v, dk, dv = (np.concatenate([part[slot][n][period][:, sinks:] for part in seen]) for n in range(4))
        turn = functools.partial(_turned, frequencies_of(tapped, spec.pattern[slot].mixer, len(rows[0])), sinks, len(rows[0]))
        for side, x, slope in (("raw", k, dk), ("rotated", turn(k), turn(dk)), ("values", v, dv)):
            for share in outliers:
                _of_layer(made, f"{side}/{share:g}", x, np.square(slope, dtype=np.float64), share, bits, side == "values")
    return {name: np.stack(layers).astype(np.float32) for name, layers in made.items()} | {MODEL: np.uint32(words(model))}


@jax.jit
def _read(model: DecoderModel, tokens: Int[Array, "B T"]) -> tuple[Any, ...]:
    """(keys, values, and the gradient by each) [periods, B, T, K, D] of every slot of the pattern."""
    state = model.init_state(*tokens.shape)

    def loss(taps):
        layers = tuple(replaced(x, k=k, v=v) for x, (k, v) in zip(state["layers"], taps, strict=True))
        hidden, after, _ = model(whole_texts(tokens), state | {"layers": layers})
        logprobs, _ = logprobs_of(model, hidden[:, :-1], tokens[:, 1:])
        return -logprobs.sum(), [(x.held.k, x.held.v) for x in after["layers"]]

    slopes, held = jax.grad(loss, has_aux=True)([(x.k, x.v) for x in state["layers"]])
    return tuple((*x, *slope) for x, slope in zip(held, slopes, strict=True))


def in_parts(read: Callable, model: DecoderModel, rows: Sequence[Sequence[int]], at_once: int) -> list[Any]:
    """read(model, tokens), arrays [periods, B, ...], of `at_once` rows at a time, or as many as the ambient mesh shares out."""
    at_once, found = padded_rows(at_once, dataclasses.replace(model.spec.rules, sequence=())), []
    for n in range(0, len(rows), at_once):
        part = np.asarray(rows[n : n + at_once], np.int32)
        padded = jnp.asarray(np.pad(part, ((0, at_once - len(part)), (0, 0))))
        found.append(jax.tree.map(lambda x, real=len(part): np.asarray(x)[:, :real], read(model, padded)))
    return found


def whole_texts(tokens: Int[Array, "B T"]) -> Batch:
    """Of one document a row, whose length is known from its first token on."""
    return Batch(tokens=tokens, info=causal_info(jnp.ones_like(tokens), lengths=jnp.full(tokens.shape, tokens.shape[1])))


def frequencies_of(model: DecoderModel, mixer: Attention, length: int) -> Frequencies | None:
    """Of a layer's rope for rows of `length` tokens, as they were learned if they are; None without rotation."""
    rope = model.spec.rope_of(mixer)
    return None if rope is None else model.rope() if rope.learned else rope.frequencies(mixer.head_dim, length)


def _turned(
    frequencies: Frequencies | None, sinks: int, length: int, x: Float[np.ndarray, "N S K D"]
) -> Float[np.ndarray, "N S K D"]:
    if frequencies is None:
        return x
    places = jnp.broadcast_to(jnp.arange(sinks, length, dtype=jnp.float32)[None, :, None], (*x.shape[:2], 1))
    lengths = jnp.full(x.shape[:2], length, jnp.int32)
    return np.asarray(rotate(jnp.asarray(x), places, frequencies, lengths if frequencies.by_length else None, side="key"))


def _of_layer(made, name: str, x, weight, share: float, bits: Sequence[int], values: bool) -> None:
    """Adds the tables of one side of a layer."""
    add = lambda key, value: made.setdefault(f"{name}/{key}", []).append(np.asarray(value))
    if values:
        even = {"codebook": jnp.zeros((len(x), x.shape[2], 2)), "scale": jnp.ones((1, 1)), "shift": jnp.zeros((1, 1))}
        by_head = jnp.moveaxis(jnp.asarray(x), 1, 2)
        coded = Values(2, share).loose(by_head, even)
        z, r = (np.moveaxis(np.asarray(halves(coded.range[..., n : n + 1])), 1, 2) for n in (0, 1))
        place = np.moveaxis(np.asarray(coded.place, np.int64), 1, 2)
        inside = ~(place[..., None] == np.arange(x.shape[3])).any(axis=3)
    else:
        flat = x.reshape(-1, *x.shape[2:])
        upper, lower = np.percentile(flat, [100 * (1 - share / 2), 100 * share / 2], axis=0)
        add("upper", upper)
        add("lower", lower)
        z, r = (upper + lower) / 2, (upper - lower) / 2
        inside = (x <= upper) & (x >= lower)
    scaled = ((x - z) / np.where(r > 0, r, 1))[inside]
    for width in bits:
        book = codebook(scaled, weight[inside], 2**width)
        codes = book[np.searchsorted((book[1:] + book[:-1]) / 2, scaled)]
        ratio = scaled.std() / max(codes.std(), 1e-12)
        add(f"{width}/codebook", book)
        add(f"{width}/norm", [ratio, scaled.mean() - codes.mean() * ratio])


def codebook(x: Float[np.ndarray, "N"], weight: Float[np.ndarray, "N"], size: int) -> Float[np.ndarray, "size"]:
    """Ascending centres of weighted k-means: of two, begun at quantiles of the numbers and of their weights, the nearer."""
    order = np.argsort(x, kind="stable")
    x, weight = x[order].astype(np.float64), weight[order] + 1e-30
    mass, moment = (np.concatenate([[0.0], np.cumsum(y)]) for y in (weight, weight * x))
    edges = lambda centres: np.searchsorted(x, (centres[1:] + centres[:-1]) / 2, side="right")
    begin = (np.arange(size) + 0.5) / size
    found = []
    for centres in (np.quantile(x, begin), x[np.searchsorted(mass[1:], begin * mass[-1])]):
        for _ in range(ROUNDS):
            parts = np.concatenate([[0], edges(centres), [len(x)]])
            total = np.diff(mass[parts])
            new = np.where(total > 0, np.diff(moment[parts]) / np.where(total > 0, total, 1), centres)
            if np.array_equal(new, centres):
                break
            centres = np.sort(new)
        nearest = np.repeat(centres, np.diff(np.concatenate([[0], edges(centres), [len(x)]])))
        found.append((float((weight * np.square(x - nearest)).sum()), centres))
    return min(found, key=lambda one: one[0])[1]
