"""Attention to chunks that are chosen for each query and head, and numbered as if nothing stood between them (LongHeads, 2024).

A chunk is summed up, for each query head, by attention within it, both ways, of queries turned by their place in the chunk: the
mean of its outputs asks the chunk's turned keys once more, and what it gets of them is what a raw query is compared with.

A query sees its own chunk as trained. Of a chunk before it, with `ahead` chosen ones from there to its own, the key at place j
is at distance ahead x chunk + (i mod chunk) - j: so keys are turned once, by their place in their chunk, and queries for every
number of chunks ahead, of which each head takes its own. Some queries meet one chunk after the other, in a softmax that grows;
chunks that none of them chose are skipped. The choice has no gradient.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import Chunk, Mask
from lcx.attention.merge import merge
from lcx.positions.distance_plan import Distances, plain
from lcx.positions.rotate import rotate
from pallas_kernels.target import precision
from pallas_kernels.tile_attention import op

HELD = 1 << 22  # numbers that some queries, turned and compared, may be
NEVER = np.iinfo(np.int32).max


class Chunks(NamedTuple):
    """The N whole chunks of each row, in the order of their documents. segment: NEVER where there are fewer."""

    k: Float[Array, "B N C K D"]  # turned by their place in the chunk
    v: Float[Array, "B N C K D"]
    summary: Float[Array, "B N H D"]
    number: Int[Array, "B N"]
    segment: Int[Array, "B N"]


class Choice(NamedTuple):
    """What queries chose. ahead: how many chosen chunks lie from there to a query's own, at least 1."""

    chosen: Bool[Array, "B T H N"]
    ahead: Int[Array, "B T H N"]


@dataclasses.dataclass(frozen=True)
class ChosenChunks(op.Fold):
    """Keys come with the queries of their tokens (`LongHeads.held`), all of a document's up to the queries', in any order.
    Rows with shared tokens or readers give NaN: no chunk is theirs."""

    form: str
    mask: Mask
    scale: float
    softcap: float | None
    distances: Distances

    def forward(self, q, k, v, q_tokens, k_tokens):
        k, asking = self._split(q, k)
        turned = self._turn(q, q_tokens.index).astype(q.dtype), self._turn(k, k_tokens.index, "key").astype(k.dtype)
        own = self._own.forward(*turned, v, q_tokens, k_tokens)
        places, chunks = self._chunks(k, asking, v, k_tokens)

        def some(given):
            q, tokens = given
            choice, queries = self._choose(q, tokens, chunks), self._for_every_number(q, tokens)

            def add(carry, n):
                return self._if_chosen(choice, n, lambda carry: self._add(carry, queries, choice, chunks, n), carry), None

            rows = q.shape[:3]
            none = jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, -jnp.inf)
            return jax.lax.scan(add, none, jnp.arange(places.shape[1]))[0]

        far = jax.lax.map(some, self._cut(places, q, q_tokens))
        far = tuple(jnp.moveaxis(x, 0, 1).reshape(len(q), -1, *x.shape[3:])[:, : q.shape[1]] for x in far)
        undefined = (q_tokens.segments < 0).any(axis=1) | (k_tokens.segments < 0).any(axis=1)
        return tuple(jnp.where(undefined.reshape(-1, *(1,) * (x.ndim - 1)), jnp.nan, x) for x in merge(own, far))

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out):
        held, (k, asking) = k, self._split(q, k)
        turn = lambda q, k: (
            self._turn(q, q_tokens.index).astype(q.dtype),
            self._turn(k, k_tokens.index, "key").astype(k.dtype),
        )
        turned, back = jax.vjp(turn, q, k)
        dq, dk, dv = self._own.backward(*turned, v, q_tokens, k_tokens, lse, delta, d_out)
        dq, dk = (x.astype(jnp.float32) for x in back((dq.astype(q.dtype), dk.astype(k.dtype))))
        places, chunks = self._chunks(k, asking, v, k_tokens)

        def some(totals, given):
            q, tokens, lse, delta, d_out = given
            choice = self._choose(q, tokens, chunks)
            queries, back = jax.vjp(lambda q: self._for_every_number(q, tokens), q)

            def add(carry, n):
                given = queries, choice, chunks, n, lse, delta, d_out
                return self._if_chosen(choice, n, lambda carry: self._add_gradients(carry, *given), carry), None

            carry = jnp.zeros_like(queries), *totals
            d_queries, *totals = jax.lax.scan(add, carry, jnp.arange(places.shape[1]))[0]
            return tuple(totals), back(d_queries)[0]

        cut = self._cut(places, q, q_tokens, lse, delta, d_out)
        (dk_chunks, dv_chunks), more = jax.lax.scan(some, (jnp.zeros_like(chunks.k), jnp.zeros_like(chunks.v)), cut)
        dq = dq + jnp.moveaxis(more, 0, 1).reshape(len(q), -1, *q.shape[2:])[:, : q.shape[1]]
        take = lambda k, v: self._take(places, k, v, k_tokens)
        more = jax.vjp(take, k.astype(jnp.float32), v.astype(jnp.float32))[1]((dk_chunks, dv_chunks))
        dk = jnp.pad(dk + more[0], [(0, 0)] * 3 + [(0, held.shape[-1] - k.shape[-1])])
        return dq, dk, dv + more[1]

    @property
    def _own(self):
        return op.Tiled(self.form, self.mask & Chunk(size=self.distances.plan.chunk), self.scale, self.softcap)

    def _split(self, q, k):
        """(keys, the queries of their tokens)."""
        return k[..., : q.shape[-1]], k[..., q.shape[-1] :].reshape(*k.shape[:2], *q.shape[2:])

    def _turn(self, x, index, side="query"):
        return rotate(x, plain(index), self.distances.frequencies, side=side)

    def _scores(self, products):
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def _chunks(self, k, asking, v, tokens) -> tuple[Int[Array, "B N C"], Chunks]:
        """The places of the tokens of whole chunks in the array (S for none), and the chunks."""
        places, number, segment = self._whole(tokens)
        turned, values = self._take(places, k.astype(jnp.float32), v.astype(jnp.float32), tokens)
        if self.distances.summed:
            summary = _taken(places[..., -1], asking)[0].astype(jnp.float32)
        else:
            summary = self._summaries(places, asking, turned, values, tokens, places[..., 0] < k.shape[1])
        return places, Chunks(turned, values, jax.lax.stop_gradient(summary), number, segment)

    def sum_up(self, k, v, tokens, new: Bool[Array, "B S"]):
        """Keys as a cache holds them: behind the last of a whole chunk stands the summary, not its queries. new: the tokens
        that were not there before, of which alone chunks can have become whole."""
        keys, asking = k[..., : self.distances.head_dim], k[..., self.distances.head_dim :]
        asking = asking.reshape(*k.shape[:2], -1, keys.shape[-1])
        places, _, _ = self._whole(tokens)
        (closed,) = _taken(places[..., -1], new)
        at = jnp.arange(len(k))[:, None], jnp.where(closed, places[..., -1], k.shape[1])

        def written(asking):
            turned, values = self._take(places, keys.astype(jnp.float32), v.astype(jnp.float32), tokens)
            summary = self._summaries(places, asking, turned, values, tokens, closed).astype(k.dtype)
            return asking.at[at].set(summary, mode="drop")

        asking = jax.lax.cond(closed.any(), written, lambda asking: asking, asking)
        return jnp.concatenate([keys, asking.reshape(*k.shape[:3], -1)], axis=-1)

    def _whole(self, tokens):
        """(places of the tokens of whole chunks, S for none [B, N, C]; number and segment of each chunk [B, N])."""
        (B, S), size = tokens.index.shape, self.distances.plan.chunk
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
        return places, of_start(index, 0) // size, of_start(segments, NEVER)

    def _take(self, places, k, v, tokens):
        """Keys, turned by their place in their chunk, and values of chunks."""
        return _taken(places, self._turn(k, tokens.index % self.distances.plan.chunk, "key"), v)

    def _summaries(self, places, asking, k, v, tokens, wanted: Bool[Array, "B N"]) -> Float[Array, "B N H D"]:
        """Of the wanted chunks; k and v are theirs, turned. As wide as keys are, which a cache holds them beside."""
        (turned,) = _taken(places, self._turn(asking, tokens.index % self.distances.plan.chunk))
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (turned, k, v, wanted))

        def one(arrays):
            *arrays, wanted = arrays
            return jax.lax.cond(wanted, self._summary, lambda asking, k, v: jnp.zeros(asking.shape[1:]), *arrays)

        return jax.lax.map(one, flat).reshape(*k.shape[:2], *asking.shape[2:]).astype(asking.dtype).astype(jnp.float32)

    def _summary(self, asking, k, v) -> Float[Array, "H D"]:
        asking = asking.reshape(len(k), k.shape[1], -1, asking.shape[-1])
        weights = jax.nn.softmax(self._scores(_product("tkgd,skd->kgts", asking, k)), axis=-1)
        mean = _product("kgts,ske->kge", weights, v) / len(k)
        weights = jax.nn.softmax(self._scores(_product("kge,ske->kgs", mean, k)), axis=-1)
        return _product("kgs,skd->kgd", weights, k).reshape(-1, k.shape[-1])

    def _cut(self, places, q, *arrays):
        """Queries and what comes with them in blocks [blocks, B, n, ...], float32."""
        (B, T, H, D), plan = q.shape, self.distances.plan
        each = B * H * max((plan.chunks - 1) * D, plan.chunk, places.shape[1])
        size = max(1, min(T, HELD // each))

        def cut(x):
            x = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
            x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

        return jax.tree.map(cut, (q, *arrays))

    def _choose(self, q, tokens, chunks: Chunks) -> Choice:
        plan, own = self.distances.plan, (tokens.index // self.distances.plan.chunk)[..., None]
        before = (chunks.segment[:, None] == tokens.segments[..., None]) & (chunks.number[:, None] < own)
        always = before & ((chunks.number[:, None] == 0) | (chunks.number[:, None] == own - 1))
        fit = _product("bthd,bnhd->bthn", q, chunks.summary)
        fit = jnp.where((before & ~always)[:, :, None], fit, -jnp.inf)
        most, best = jax.lax.top_k(fit, min(plan.chunks - 3, fit.shape[-1]))
        b, t, h = jnp.ix_(*map(jnp.arange, fit.shape[:3]))
        chosen = jnp.broadcast_to(always[:, :, None], fit.shape)
        chosen = chosen.at[b[..., None], t[..., None], h[..., None], best].max(most > -jnp.inf)
        reached = jnp.cumsum(chosen, axis=-1)
        return Choice(chosen, jnp.maximum(reached[..., -1:] - reached + 1, 1))

    def _for_every_number(self, q, tokens) -> Float[Array, "B T n H D"]:
        """Queries turned for 1, 2, ... chunks ahead."""
        size, most = self.distances.plan.chunk, self.distances.plan.chunks
        index = (tokens.index % size)[..., None] + size * jnp.arange(1, most)
        flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[3:])
        many = jnp.broadcast_to(q[:, :, None], (*q.shape[:2], most - 1, *q.shape[2:]))
        return self._turn(flat(many), flat(index)).reshape(many.shape)

    def _if_chosen(self, choice: Choice, n, then, carry):
        return jax.lax.cond(jnp.any(choice.chosen[..., n]), then, lambda carry: carry, carry)

    def _against(self, queries, choice: Choice, chunks: Chunks, n):
        """(places of the queries taken, them by key head, the chunk's keys and values, products, whether they count)."""
        B, T, _, H, D = queries.shape
        b, t, h = jnp.ix_(*map(jnp.arange, (B, T, H)))
        at = b, t, choice.ahead[..., n] - 1, h
        k, v = chunks.k[:, n], chunks.v[:, n]
        x = queries[at].reshape(B, T, k.shape[2], -1, D)
        return at, x, k, v, _product("btkgd,bskd->btkgs", x, k), choice.chosen[..., n].reshape(*x.shape[:4], 1)

    def _add(self, carry, queries, choice, chunks, n):
        _, _, _, v, products, seen = self._against(queries, choice, chunks, n)
        scores = jnp.where(seen, self._scores(products), -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(seen, jnp.exp(scores - jnp.where(seen[..., 0], lse, 0)[..., None]), 0)
        out = _product("btkgs,bske->btkge", weights, v)
        return merge(carry, (out.reshape(carry[0].shape), lse.reshape(carry[1].shape)))

    def _add_gradients(self, carry, queries, choice, chunks, n, lse, delta, d_out):
        d_queries, dk, dv = carry
        at, x, k, v, products, seen = self._against(queries, choice, chunks, n)
        by_head = lambda y: y.reshape(*x.shape[:4], *y.shape[3:])
        scores, back = jax.vjp(self._scores, products)
        lse, delta, d_out = by_head(lse)[..., None], by_head(delta)[..., None], by_head(d_out)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse, 0)), 0)
        (ds,) = back(p * (_product("btkge,bske->btkgs", d_out, v) - delta))
        dx = _product("btkgs,bskd->btkgd", ds, k).reshape(*x.shape[:2], -1, x.shape[-1])
        dk = dk.at[:, n].add(_product("btkgs,btkgd->bskd", ds, x))
        dv = dv.at[:, n].add(_product("btkgs,btkge->bske", p, d_out))
        return d_queries.at[at].add(dx), dk, dv


def _taken(places, *arrays):
    """Tokens [B, S, ...] at places [B, ...], 0 where there is none."""
    b = jnp.arange(len(places)).reshape(-1, *(1,) * (places.ndim - 1))
    return tuple(x.at[b, places].get(mode="fill", fill_value=0) for x in arrays)


def _product(how, a, b):
    return jnp.einsum(how, a, b, precision=precision(jnp.float32))
