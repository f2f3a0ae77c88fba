"""Whole chunks of documents, and what sums each up for the queries that choose among them (LongHeads, 2024).

A chunk is summed up, for each query head, by attention within it, both ways, of queries turned by their place in the chunk: the
mean of its outputs asks the chunk's turned keys once more, and what it gets of them is what a raw query is compared with.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx.positions.distance_plan import Distances, plain
from lcx.positions.rotate import rotate
from pallas_kernels.target import precision
from pallas_kernels.tile_attention.tokens import Tokens

NEVER = np.iinfo(np.int32).max


class Whole(NamedTuple):
    """The N whole chunks of each row, in the order of their documents. places: of their tokens in the array, its length for
    none. segment: NEVER where there are fewer."""

    places: Int[Array, "B N C"]
    number: Int[Array, "B N"]
    segment: Int[Array, "B N"]


def sum_up(
    k: Float[Array, "B S K X"],
    v: Float[Array, "B S K E"],
    tokens: Tokens,
    new: Bool[Array, "B S"],
    *,
    distances: Distances,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B S K X"]:
    """Keys as a cache holds them: behind the last of a whole chunk stands the summary, not its queries. new: the tokens
    that were not there before, of which alone chunks can have become whole."""
    keys, asking = split(k, distances.head_dim)
    places = whole_chunks(tokens, distances.plan.chunk).places
    (closed,) = taken(places[..., -1], new)
    at = jnp.arange(len(k))[:, None], jnp.where(closed, places[..., -1], k.shape[1])

    def written(asking):
        turned, values = turned_chunks(places, keys.astype(jnp.float32), v.astype(jnp.float32), tokens, distances)
        options = {"distances": distances, "scale": scale, "softcap": softcap}
        summary = summaries(places, asking, turned, values, tokens, closed, **options).astype(k.dtype)
        return asking.at[at].set(summary, mode="drop")

    asking = jax.lax.cond(closed.any(), written, lambda asking: asking, asking)
    return jnp.concatenate([keys, asking.reshape(*k.shape[:3], -1)], axis=-1)


def split(k: Float[Array, "B S K X"], width: int) -> tuple[Float[Array, "B S K D"], Float[Array, "B S H D"]]:
    """(keys, the queries of their tokens, or summaries) of keys that carry queries; `width` of a head."""
    return k[..., :width], k[..., width:].reshape(*k.shape[:2], -1, width)


def whole_chunks(tokens: Tokens, size: int) -> Whole:
    """The chunks of `size` tokens that are there from the first to the last."""
    B, S = tokens.index.shape
    segments = jnp.where(tokens.segments > 0, tokens.segments, NEVER)
    order = jnp.lexsort((tokens.index, segments), axis=-1)
    segments, index = (jnp.take_along_axis(x, order, axis=1) for x in (segments, tokens.index))
    last = jnp.minimum(jnp.arange(S) + size - 1, S - 1)
    whole = (index % size == 0) & (segments != NEVER) & (segments[:, last] == segments)
    whole &= index[:, last] == index + size - 1
    count = max(1, S // size)
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=count, fill_value=S)[0])(whole)
    of_start = lambda x, other: jnp.where(starts < S, jnp.take_along_axis(x, jnp.minimum(starts, S - 1), axis=1), other)
    at = jnp.minimum(starts[..., None] + jnp.arange(size), S - 1).reshape(B, -1)
    places = jnp.where((starts < S)[..., None], jnp.take_along_axis(order, at, axis=1).reshape(B, count, size), S)
    return Whole(places, of_start(index, 0) // size, of_start(segments, NEVER))


def turned_chunks(places: Int[Array, "B N C"], k, v, tokens: Tokens, distances: Distances):
    """Keys, turned by their place in their chunk, and values of chunks [B, N, C, K, ...]."""
    return taken(places, turned(k, tokens.index % distances.plan.chunk, distances, "key"), v)


def summaries(
    places: Int[Array, "B N C"],
    asking: Float[Array, "B S H D"],
    k: Float[Array, "B N C K D"],
    v: Float[Array, "B N C K E"],
    tokens: Tokens,
    wanted: Bool[Array, "B N"],
    *,
    distances: Distances,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B N H D"]:
    """Of the wanted chunks; k and v are theirs, turned. As wide as keys are, which a cache holds them beside."""
    (queries,) = taken(places, turned(asking, tokens.index % distances.plan.chunk, distances))
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (queries, k, v, wanted))

    def summary(asking, k, v):
        asking = asking.reshape(len(k), k.shape[1], -1, asking.shape[-1])
        weights = jax.nn.softmax(capped(product("tkgd,skd->kgts", asking, k), scale, softcap), axis=-1)
        mean = product("kgts,ske->kge", weights, v) / len(k)
        weights = jax.nn.softmax(capped(product("kge,ske->kgs", mean, k), scale, softcap), axis=-1)
        return product("kgs,skd->kgd", weights, k).reshape(-1, k.shape[-1])

    def one(arrays):
        *arrays, wanted = arrays
        return jax.lax.cond(wanted, summary, lambda asking, k, v: jnp.zeros(asking.shape[1:]), *arrays)

    return jax.lax.map(one, flat).reshape(*k.shape[:2], *asking.shape[2:]).astype(asking.dtype).astype(jnp.float32)


def taken(places, *arrays):
    """Tokens [B, S, ...] at places [B, ...], 0 where there is none."""
    b = jnp.arange(len(places)).reshape(-1, *(1,) * (places.ndim - 1))
    return tuple(x.at[b, places].get(mode="fill", fill_value=0) for x in arrays)


def turned(x, index, distances: Distances, side="query"):
    """Queries or keys, each turned by its index."""
    return rotate(x, plain(index), distances.frequencies, side=side)


def capped(products, scale: float, softcap: float | None):
    """Scores of products."""
    scores = products * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def product(how: str, a, b):
    """An einsum in float32."""
    return jnp.einsum(how, a, b, precision=precision(jnp.float32))
