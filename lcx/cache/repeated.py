"""The second reading of a text that a KV cache holds: what its tokens are looked at as a pass repeats some of them.

See `lcx.cache.policies.kvzip`. The pass itself is not kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcx.batch import TokenInfo
from lcx.cache.kv_state import KVState, Pass, joined, rounded_up
from lcx.cache.scorers.scorer import Asked, Rule, logits
from lcx.positions.frequencies import Frequencies

AT_ONCE = 64  # queries


def repeated(cache: Any, state: Pass, asked: Asked, frequencies: Frequencies | None, rule: Rule) -> KVState:
    """The state as it was before the pass, but for the marks of the tokens that it repeats, the chunk that begins at the index
    `repeats`."""
    was, policy, codec = state.state, cache.policy, cache.codec
    held, wait, start, S = was.held, was.waiting, was.repeats, was.held.info.segments.shape[2]
    size = min(rounded_up(policy.chunk, codec.block) + codec.block, S)
    place = jnp.clip((start - codec.first) // codec.block, 0, (S - size) // codec.block)  # counted in blocks
    cut = lambda tree, place, size: jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, place * (codec.block * x.shape[2] // S), size * x.shape[2] // S, axis=2), tree
    )

    def keys(place, size: int):
        codes, info = cut(held.k, place, size), cut(held.info, place, size)
        return cache.turned_slots(cache.coders[0].decode(codes, was.tables[0]), info, frequencies), info

    exact, R, ahead = joined(state), wait.k.shape[1], min(rounded_up(policy.sinks, codec.block), S)
    late = jax.tree.map(lambda x: x[:, None], exact.info)
    sink = lambda info: info.index < jnp.minimum(start, policy.sinks)
    told = lambda info: (info.index >= start) & (info.index < start + policy.chunk)
    k, info = keys(place, size)
    parts = [(k, info, told(info))]
    own = jnp.arange(late.index.shape[2]) >= R
    parts += [(jnp.moveaxis(cache.turned(exact.k, exact.info, frequencies), 2, 1), late, own | sink(late) | told(late))]
    if ahead:
        k, first = keys(0, ahead)
        parts += [(k, first, sink(first))]
    by_head = lambda x: jnp.broadcast_to(x, (len(x), exact.k.shape[2], *x.shape[2:]))
    k, infos, there = jax.tree.map(lambda *xs: jnp.concatenate([*map(by_head, xs)], axis=2), *parts)
    found = most_looked_at(asked, k, infos, there, rule)
    of_slots, of_late = found[:, :, :size], found[:, :, size : size + R]
    marks = jnp.maximum(cut(held.marks, place, size), jnp.where(told(info), of_slots, 0))
    marks = jax.lax.dynamic_update_slice_in_dim(held.marks, marks, place * codec.block, axis=2)
    late_marks = jnp.where(told(wait.info)[..., None], jnp.moveaxis(of_late, 1, 2), 0)
    waiting = dataclasses.replace(wait, marks=jnp.maximum(wait.marks, late_marks))
    return dataclasses.replace(was, held=dataclasses.replace(held, marks=marks), waiting=waiting)


def most_looked_at(
    asked: Asked, k: Float[Array, "B K N D"], info: TokenInfo, there: Bool[Array, "B K N"], rule: Rule
) -> Float[Array, "B K N"]:
    """The largest probability that a query of a pass, and a head of a group, gives each token among those that are `there`."""
    T = asked.q.shape[1]
    size = min(AT_ONCE, T)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % size)) + ((0, 0),) * (x.ndim - 2))
    several = jax.tree.map(lambda x: jnp.moveaxis(pad(x).reshape(len(x), -1, size, *x.shape[2:]), 1, 0), (asked.q, asked.info))

    def some(part):
        s = jnp.where(there[:, :, None, None], logits(part[0], k, part[1], info, rule), -jnp.inf)
        top = s.max(axis=-1, keepdims=True)
        p = jnp.where(s > -jnp.inf, jnp.exp(s - jnp.where(top > -jnp.inf, top, 0)), 0)
        return (p / jnp.maximum(p.sum(axis=-1, keepdims=True), 1e-30)).max(axis=(2, 3))

    return jax.lax.map(some, several).max(axis=0)
