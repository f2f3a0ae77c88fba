"""Squeezed Attention (2024): what rows have read becomes a prefix whose keys are clustered, once, for any questions behind it.

    book = squeeze(model, prefill(model, [ids], 1, 256, 512))       # may be saved (saved.py) and used again
    answers, _ = answer(model, feed(model, *question, book), max_new=32)

The threshold is one for all layers and heads of a row: a quantile, over the clustered tokens of all of them, of what the last
queries of the prefix find each worth; their mean for passes of several tokens, each alone for a single token.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.batch import PADDING
from lcx.cache.kv_cache import KVCache
from lcx.cache.kv_state import KVState
from lcx.cache.scorers.scorer import Rule
from lcx.cache.selectors.clusters import Clusters, Level, mean_scores, scores
from lcx.cache.selectors.squeezed import Squeezed
from lcx.inference.calibration import frequencies_of
from lcx.inference.reading import Consumed
from lcx.mixers.attention import Attention
from lcx.models.decoder import Decoder, DecoderModel
from lcx.parallel.rules import shard
from lcx.positions.frequencies import Frequencies
from lcx.record import replaced
from lcx.spec import SpecError


def squeezed(model: DecoderModel, read: Consumed) -> Consumed:
    """The rows, squeezed if some layer of the model reads clusters."""
    return squeeze(model, read) if _squeezed(model.spec) else read


def squeeze(model: DecoderModel, read: Consumed) -> Consumed:
    """The rows, with what they have read as their prefix; rows with fewer tokens than are always read stay as they are.

    Raises SpecError if no layer's cache has a Squeezed selector, or some have others than the rest; ValueError for rows of
    several documents, or arrays of several processes.
    """
    spec, states = model.spec, read.state["layers"]
    selector = _selector(spec)
    if jax.process_count() > 1:
        raise ValueError(f"squeeze: {jax.process_count()} processes: expected one, which sees the scores of all heads")
    made, found, turns = {}, [], {}
    for layer, state in _layers(spec, states):
        n = layer % len(spec.pattern)
        mixer = spec.pattern[n].mixer
        if layer < selector.dense_layers:
            continue
        if n not in turns:
            turns[n] = frequencies_of(model, mixer, state.length) if mixer.cache.keys == "raw" else None
        number, above = _numbers(selector, state)
        key = jax.random.fold_in(jax.random.key(selector.seed), layer)
        made[layer], worth = _prefix(mixer.cache, _rule(mixer), turns[n], state, jnp.asarray(number), jnp.asarray(above), key)
        found.append(jax.tree.map(np.asarray, worth))
    layers = _replaced(spec, states, made, _bounds(selector, found)) if found else states
    return dataclasses.replace(read, state=read.state | {"layers": layers})


def shares(model: DecoderModel, read: Consumed) -> Float[np.ndarray, "L B K"]:
    """Of the clustered tokens of a prefix, the share that the newest query of each row reads in every layer that squeezes."""
    selector, found = _selector(model.spec), []
    for layer, state in _layers(model.spec, read.state["layers"]):
        if layer >= selector.dense_layers:
            rule = _rule(model.spec.pattern[layer % len(model.spec.pattern)].mixer)
            found.append(np.asarray(_share(selector, rule, state.held.pages, state.newest[:, -1:])))
    return np.stack(found)


@functools.partial(jax.jit, static_argnames=("selector", "rule"))
def _share(selector: Squeezed, rule: Rule, told: Clusters, newest: Float[Array, "B 1 H D"]) -> Float[Array, "B K"]:
    counts, chosen = told.fine.counts, selector.chosen(newest, jnp.ones((len(newest), 1), bool), told, rule)
    return jnp.where(chosen, counts, 0).sum(axis=2) / jnp.maximum(counts.sum(axis=2), 1)


def _squeezed(spec: Decoder) -> list[int]:
    """Slots of the pattern."""
    caches = [getattr(layer.mixer, "cache", None) for layer in spec.pattern]
    return [n for n, cache in enumerate(caches) if isinstance(cache, KVCache) and isinstance(cache.selector, Squeezed)]


def _selector(spec: Decoder) -> Squeezed:
    found = [spec.pattern[n].mixer.cache.selector for n in _squeezed(spec)]
    if not found or len(set(found)) > 1:
        raise SpecError(f"model.pattern: selectors {found}: expected one Squeezed, the same in all layers that have one")
    return found[0]


def _rule(mixer: Attention) -> Rule:
    return Rule(mask=mixer.mask, scale=mixer.softmax_scale, softcap=mixer.softcap, bias=mixer.distance_bias)


def _layers(spec: Decoder, states: Any) -> Iterator[tuple[int, KVState]]:
    """(number, state) of the layers that squeeze."""
    for period in range(spec.periods):
        for n in _squeezed(spec):
            apart = isinstance(states, list)
            state = states[period][n] if apart else jax.tree.map(lambda x, p=period: x[p], states[n])
            yield period * len(spec.pattern) + n, state


def _numbers(selector: Squeezed, state: KVState) -> tuple[Int[np.ndarray, "B"], Int[np.ndarray, "B"]]:
    """Clusters of each row, and those of the level above, 0 where there is nothing to cluster."""
    held, wait, seen = state.held.info, state.waiting.info, np.asarray(state.seen)
    segments, index = np.asarray(held.segments[:, 0]), np.asarray(held.index[:, 0])
    each = np.concatenate([segments, np.asarray(wait.segments)], axis=1)
    several = [row for row, held in enumerate(each) if len(np.unique(held[held != PADDING])) > 1]
    if several:
        raise ValueError(f"squeeze: rows {several} hold several documents: expected one, the prefix")
    there = ((segments != PADDING) & (index < (seen - selector.observed)[:, None])).sum(axis=1)
    whole = np.maximum(seen - selector.observed, 0)
    number = lambda share: np.asarray([min(selector.number(int(n), share), int(m)) for n, m in zip(whole, there, strict=True)])
    fine = number(selector.clusters)
    above = np.zeros_like(fine) if selector.coarse is None else np.minimum(number(selector.coarse.clusters), fine)
    return fine.astype(np.int32), above.astype(np.int32)


@functools.partial(jax.jit, static_argnames=("cache", "rule", "frequencies"))
def _prefix(
    cache: KVCache,
    rule: Rule,
    frequencies: Frequencies | None,
    state: KVState,
    number: Int[Array, "B"],
    above: Int[Array, "B"],
    key: Array,
) -> tuple[Clusters, list[tuple[Array, Array, Array]]]:
    """(clusters of a layer, and of each level the scores of the newest queries' mean [B, K, C], of each [B, K, W, C], -inf for
    none, and tokens [B, K, C])."""
    selector, held, newest = cache.selector, state.held, state.newest
    k = cache.turned_slots(cache.coders[0].decode(held.k, state.tables[0]), held.info, frequencies)
    there = (held.info.segments[:, 0] != PADDING) & (held.info.index[:, 0] < (state.seen - selector.observed)[:, None])
    told = selector.clustered(held.pages, k, there, number, above, key)
    real = state.newest_info.segments != PADDING

    def worth(level: Level):
        each = jax.nn.logsumexp(scores(newest, level.k, level.counts, rule), axis=2) - jnp.log(newest.shape[2] / k.shape[1])
        each = jnp.where(real[:, None, :, None], each, -jnp.inf)
        return mean_scores(newest, real, level.k, level.counts, rule), each, level.counts

    return told, [worth(level) for level in (told.fine, told.coarse) if level is not None]


def _bounds(selector: Squeezed, found: list[list[tuple]]) -> list[Float[np.ndarray, "B 2"]]:
    """Of each level the logarithms of the thresholds of every row, for passes of several tokens and of one; -inf where heads
    have a single cluster, which any query finds worth the same, so that rounding would choose."""
    shares = [selector.quantile] if selector.coarse is None else [selector.quantile, selector.coarse.quantile]
    rows, made = len(found[0][0][0]), []
    for level, share in enumerate(shares):
        bound = np.full((rows, 2), -np.inf)
        for row in range(rows):
            if max((layer[level][2][row] > 0).sum(axis=1).max() for layer in found) <= 1:
                continue
            bound[row] = log_quantile([(layer[level][0][row], layer[level][2][row]) for layer in found], share)
            if selector.calibrated == "alone":
                each = [(layer[level][1][row], layer[level][2][row][:, None]) for layer in found]
                bound[row, 1] = log_quantile(each, share)
        made.append(bound)
    return made


def log_quantile(parts: list[tuple[np.ndarray, np.ndarray]], share: float) -> float:
    """The logarithm of the quantile of numbers, given by theirs, each as often as its count says, between two of them in
    proportion, as NumPy's; -inf for a share of 0."""
    values = np.concatenate([x.astype(np.float64).ravel() for x, _ in parts])
    counts = np.concatenate([np.broadcast_to(n, x.shape).ravel() for x, n in parts]) * np.isfinite(values)
    values, counts = np.exp(values[counts > 0]), counts[counts > 0].astype(np.int64)
    if share == 0 or not len(values):
        return -np.inf
    order = np.argsort(values, kind="stable")
    values, ends = values[order], np.cumsum(counts[order])
    place = share * (ends[-1] - 1)
    low, high = values[np.searchsorted(ends, [np.floor(place), np.ceil(place)], side="right")]
    return float(np.log(low + (high - low) * (place - np.floor(place))))


def _replaced(spec: Decoder, states: Any, made: dict[int, Clusters], bounds: list[np.ndarray]) -> Any:
    """States with clusters and thresholds, which choose from now on."""
    apart, period = isinstance(states, list), len(spec.pattern)
    rows = lambda level, bound: replaced(level, bounds=jnp.broadcast_to(jnp.asarray(bound)[:, None], level.bounds.shape))

    def new(state: KVState, told: Clusters | None) -> tuple[Clusters, Array]:
        if told is None:
            return state.held.pages, state.selects
        names = ("fine", "coarse")[: len(bounds)]
        levels = {name: rows(getattr(told, name), bound) for name, bound in zip(names, bounds, strict=True)}
        told = replaced(told, **levels)
        place = lambda x: shard(x, spec.rules, "batch", "kv_heads", *(None,) * (x.ndim - 2))
        return jax.tree.map(place, told), jnp.ones_like(state.selects)

    found = {layer: new(state, made.get(layer)) for layer, state in _layers(spec, states)}
    put = lambda state, told, selects: replaced(state, held=replaced(state.held, pages=told), selects=selects)
    if apart:
        each = lambda p, n, state: put(state, *found[p * period + n]) if p * period + n in found else state
        return [tuple(each(p, n, state) for n, state in enumerate(layers)) for p, layers in enumerate(states)]
    stacked = lambda n: jax.tree.map(lambda *x: jnp.stack(x), *(found[p * period + n] for p in range(spec.periods)))
    return tuple(put(state, *stacked(n)) if n in _squeezed(spec) else state for n, state in enumerate(states))
