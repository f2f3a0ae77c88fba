"""Attention to chunks that are chosen for each query and head, and numbered as if nothing stood between them (LongHeads, 2024).

A query sees its own chunk as trained. Of a chunk before it, with `ahead` chosen ones from there to its own, the key at place j
is at distance ahead x chunk + (i mod chunk) - j: so keys are turned once, by their place in their chunk, and queries for every
number of chunks ahead, of which each head takes its own. Some queries meet one chunk after the other, in a softmax that grows;
chunks that none of them chose are skipped. The choice, by what sums a chunk up (`chunk_summaries.py`), has no gradient.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.chunk_summaries import capped, product, split, summaries, taken, turned, turned_chunks, whole_chunks
from lcx.attention.distance_fold import DistanceFold
from lcx.attention.mask import Chunk
from lcx.attention.merge import merge
from pallas_kernels.tile_attention import op

HELD = 1 << 22  # numbers that some queries, turned and compared, may be


class Chunks(NamedTuple):
    """The N whole chunks of each row. segment: NEVER where there are fewer."""

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
class ChosenChunks(DistanceFold):
    """Keys come with the queries of their tokens (`LongHeads.held`), all of a document's up to the queries', in any order.
    Rows with shared tokens or readers give NaN: no chunk is theirs."""

    def forward(self, q, k, v, q_tokens, k_tokens):
        k, asking = split(k, q.shape[-1])
        near = self._turn(q, q_tokens.index).astype(q.dtype), self._turn(k, k_tokens.index, "key").astype(k.dtype)
        own = self._own.forward(*near, v, q_tokens, k_tokens)
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
        held, (k, asking) = k, split(k, q.shape[-1])
        turn = lambda q, k: (
            self._turn(q, q_tokens.index).astype(q.dtype),
            self._turn(k, k_tokens.index, "key").astype(k.dtype),
        )
        near, back = jax.vjp(turn, q, k)
        dq, dk, dv = self._own.backward(*near, v, q_tokens, k_tokens, lse, delta, d_out)
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
        take = lambda k, v: turned_chunks(places, k, v, k_tokens, self.distances)
        more = jax.vjp(take, k.astype(jnp.float32), v.astype(jnp.float32))[1]((dk_chunks, dv_chunks))
        dk = jnp.pad(dk + more[0], [(0, 0)] * 3 + [(0, held.shape[-1] - k.shape[-1])])
        return dq, dk, dv + more[1]

    @property
    def _own(self):
        return op.Tiled(self.form, self.mask & Chunk(size=self.distances.plan.chunk), self.scale, self.softcap)

    def _turn(self, x, index, side="query"):
        return turned(x, index, self.distances, side)

    def _scores(self, products):
        return capped(products, self.scale, self.softcap)

    def _chunks(self, k, asking, v, tokens) -> tuple[Int[Array, "B N C"], Chunks]:
        """The places of the tokens of whole chunks in the array (S for none), and the chunks."""
        places, number, segment = whole_chunks(tokens, self.distances.plan.chunk)
        keys, values = turned_chunks(places, k.astype(jnp.float32), v.astype(jnp.float32), tokens, self.distances)
        if self.distances.summed:
            summary = taken(places[..., -1], asking)[0].astype(jnp.float32)
        else:
            there, options = places[..., 0] < k.shape[1], {"scale": self.scale, "softcap": self.softcap}
            summary = summaries(places, asking, keys, values, tokens, there, distances=self.distances, **options)
        return places, Chunks(keys, values, jax.lax.stop_gradient(summary), number, segment)

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
        fit = product("bthd,bnhd->bthn", q, chunks.summary)
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
        return at, x, k, v, product("btkgd,bskd->btkgs", x, k), choice.chosen[..., n].reshape(*x.shape[:4], 1)

    def _add(self, carry, queries, choice, chunks, n):
        _, _, _, v, products, seen = self._against(queries, choice, chunks, n)
        scores = jnp.where(seen, self._scores(products), -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.where(seen, jnp.exp(scores - jnp.where(seen[..., 0], lse, 0)[..., None]), 0)
        out = product("btkgs,bske->btkge", weights, v)
        return merge(carry, (out.reshape(carry[0].shape), lse.reshape(carry[1].shape)))

    def _add_gradients(self, carry, queries, choice, chunks, n, lse, delta, d_out):
        d_queries, dk, dv = carry
        at, x, k, v, products, seen = self._against(queries, choice, chunks, n)
        by_head = lambda y: y.reshape(*x.shape[:4], *y.shape[3:])
        scores, back = jax.vjp(self._scores, products)
        lse, delta, d_out = by_head(lse)[..., None], by_head(delta)[..., None], by_head(d_out)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, scores - lse, 0)), 0)
        (ds,) = back(p * (product("btkge,bske->btkgs", d_out, v) - delta))
        dx = product("btkgs,bskd->btkgd", ds, k).reshape(*x.shape[:2], -1, x.shape[-1])
        dk = dk.at[:, n].add(product("btkgs,btkgd->bskd", ds, x))
        dv = dv.at[:, n].add(product("btkgs,btkge->bske", p, d_out))
        return d_queries.at[at].add(dx), dk, dv
