"""Attention to chunks that are chosen for each query and head, and numbered as if nothing stood between them (LongHeads, 2024).

A chunk is summed up, for each query head, by attention within it, both ways, of queries turned by their place in the chunk: the
mean of its outputs asks the chunk's turned keys once more, and what it gets of them is what a raw query is compared with.

With the chunks of a query in their order, r the place of one among them and n their number, a key has distance
(n - 1 - r) chunk + (i mod chunk) - (j mod chunk): so keys are turned once, by their place in their chunk, and a query for each
of its chunks. Keys are gathered for some queries at a time, forward and backward; the choice has no gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from lcx.attention.mask import Mask
from lcx.positions.distance_plan import Distances, plain
from lcx.positions.rotate import rotate
from pallas_kernels.target import precision
from pallas_kernels.tile_attention import op

GATHERED = 1 << 25  # numbers of keys and values that are gathered at once
NEVER = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class ChosenChunks(op.Fold):
    """Keys come with the queries of their tokens (`LongHeads.held`), all of a document's up to the queries', in any order.
    Rows with shared tokens or readers give NaN: no chunk is theirs."""

    mask: Mask
    scale: float
    softcap: float | None
    distances: Distances

    def forward(self, q, k, v, q_tokens, k_tokens):
        rows = len(q)
        row = lambda q, k, v, q_tokens, k_tokens: _Row(self, rows, k, v, k_tokens).attend(q, q_tokens)
        out, lse = jax.vmap(row)(q, k, v, q_tokens, k_tokens)
        undefined = (q_tokens.segments < 0).any(axis=1) | (k_tokens.segments < 0).any(axis=1)
        poisoned = lambda x: jnp.where(undefined.reshape(-1, *(1,) * (x.ndim - 1)), jnp.nan, x)
        return poisoned(out), poisoned(lse)

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out):
        run = lambda q, k, v: self.forward(q, k, v, q_tokens, k_tokens)
        (out, _), pull = jax.vjp(run, *(x.astype(jnp.float32) for x in (q, k, v)))
        d_lse = jnp.where(lse == -jnp.inf, 0, jnp.sum(d_out * out, axis=-1) - delta)
        return pull((d_out, d_lse))

    def scores(self, products):
        scores = products * self.scale
        return scores if self.softcap is None else self.softcap * jnp.tanh(scores / self.softcap)

    def turn(self, x, index, side):
        """x [rows, T, heads, D] by index [rows, T]."""
        return rotate(x, plain(index), self.distances.frequencies, side=side)


class _Row:
    """The keys of a row in the order of their documents, turned by their place in their chunk, and what its chunks are.

    starts: where whole chunks begin [N]; number: of a chunk in its document, segment: the document's; summary [N, H, D].
    """

    def __init__(self, fold: ChosenChunks, rows: int, k, v, tokens):
        self.fold, self.rows = fold, rows
        self.chunk, self.most = fold.distances.plan.chunk, fold.distances.plan.chunks
        (S, self.K, _), D = k.shape, fold.distances.head_dim
        segments = jnp.where(tokens.segments > 0, tokens.segments, NEVER)
        order = jnp.lexsort((tokens.index, segments))
        self.segments, self.index = segments[order], tokens.index[order]
        self.v = v[order].astype(jnp.float32)
        k = k[order].astype(jnp.float32)
        turn = lambda x, side: fold.turn(x[None], (self.index % self.chunk)[None], side)[0]
        self.k, asking = turn(k[..., :D], "key"), k[..., D:].reshape(S, -1, D)
        self.H = asking.shape[1]
        self._find_chunks(S)
        self._sum_up(jax.lax.stop_gradient((turn(asking, "query"), self.k, self.v)))

    def _find_chunks(self, S):
        count = max(1, S // self.chunk)
        last = jnp.minimum(jnp.arange(S) + self.chunk - 1, S - 1)
        whole = (self.index % self.chunk == 0) & (self.segments != NEVER) & (self.segments[last] == self.segments)
        whole &= self.index[last] == self.index + self.chunk - 1
        self.starts = jnp.nonzero(whole, size=count, fill_value=S)[0]
        at = jnp.minimum(self.starts, S - 1)
        self.segment = jnp.where(self.starts < S, self.segments[at], NEVER)
        self.number = self.index[at] // self.chunk

    def _sum_up(self, arrays):
        fold = self.fold

        def one(start):
            asking, k, v = (jax.lax.dynamic_slice_in_dim(x, start, self.chunk) for x in arrays)
            asking = asking.reshape(self.chunk, self.K, -1, asking.shape[-1])
            weights = jax.nn.softmax(fold.scores(_product("tkgd,skd->kgts", asking, k)), axis=-1)
            mean = _product("kgts,ske->kge", weights, v) / self.chunk
            weights = jax.nn.softmax(fold.scores(_product("kge,ske->kgs", mean, k)), axis=-1)
            return _product("kgs,skd->kgd", weights, k).reshape(self.H, -1)

        if len(self.k) < self.chunk:
            self.summary = jnp.zeros((1, self.H, self.k.shape[-1]))
            return
        each = self.rows * self.H * self.chunk**2
        self.summary = jax.lax.map(one, self.starts, batch_size=max(1, GATHERED // each))

    def attend(self, q, tokens):
        """(out [T, H, E], lse [T, H]) of raw queries."""
        T, H, _ = q.shape
        each = self.rows * H * self.most * self.chunk * (self.k.shape[-1] + self.v.shape[-1])
        size = max(1, min(T, GATHERED // each))
        cut = lambda x: jnp.pad(x, [(0, -T % size)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
        some = jax.checkpoint(lambda given: self._attend(*given))
        found = jax.lax.map(some, (cut(q.astype(jnp.float32)), cut(tokens.index), cut(tokens.segments)))
        return tuple(x.reshape(-1, *x.shape[2:])[:T] for x in found)

    def _attend(self, q, index, segments):
        numbers = self._chosen(jax.lax.stop_gradient(q), index, segments)  # [n, H, most], NEVER where there is none
        count = jnp.minimum(index // self.chunk + 1, self.most)
        ahead = jnp.maximum(count[:, None] - 1 - jnp.arange(self.most), 0) * self.chunk
        x = jnp.broadcast_to(q[:, None], (len(q), self.most, *q.shape[1:]))
        x = self.fold.turn(x, ahead + (index % self.chunk)[:, None], "query").reshape(
            len(q), self.most, self.K, -1, q.shape[-1]
        )
        begin = jnp.searchsorted(self.segments, segments)
        place = jnp.where(numbers == NEVER, 0, numbers)[..., None] * self.chunk + jnp.arange(self.chunk)
        seen = (numbers != NEVER)[..., None] & (place <= index[:, None, None, None]) & (segments > 0)[:, None, None, None]
        at = jnp.minimum(begin[:, None, None, None] + place, len(self.k) - 1)
        head = (jnp.arange(self.H) * self.K // self.H)[None, :, None, None]
        x = jnp.moveaxis(x.reshape(len(q), self.most, self.H, -1), 2, 1)
        scores = self.fold.scores(_product("nhcd,nhcld->nhcl", x, self.k[at, head]))
        scores = jnp.where(seen, scores, -jnp.inf).reshape(len(q), self.H, -1)
        largest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        weights = jnp.exp(scores - jnp.where(largest == -jnp.inf, 0, largest))
        total = weights.sum(axis=-1, keepdims=True)
        some = total[..., 0] > 0
        lse = jnp.where(some, jnp.log(jnp.where(some, total[..., 0], 1)) + largest[..., 0], -jnp.inf)
        weights = (weights / jnp.where(total > 0, total, 1)).reshape(seen.shape)
        return _product("nhcl,nhcle->nhe", weights, self.v[at, head]), lse

    def _chosen(self, q, index, segments):
        """The numbers of the chunks that each query and head sees, in order."""
        own = index // self.chunk
        may = (self.segment == segments[:, None]) & (self.number >= 1) & (self.number <= own[:, None] - 2)
        fit = jnp.where(may[:, None], _product("nhd,chd->nhc", q, self.summary), -jnp.inf)
        fit, best = jax.lax.top_k(fit, min(self.most - 3, fit.shape[-1]))
        best = jnp.where(fit == -jnp.inf, NEVER, self.number[best])
        always = jnp.stack([jnp.zeros_like(own), jnp.where(own >= 2, own - 1, NEVER), jnp.where(own >= 1, own, NEVER)], axis=-1)
        always = jnp.broadcast_to(always[:, None], (len(q), self.H, 3))
        found = jnp.sort(jnp.concatenate([always, best], axis=-1), axis=-1)
        return jnp.pad(found, ((0, 0), (0, 0), (0, self.most - found.shape[-1])), constant_values=NEVER)


def _product(how, a, b):
    return jnp.einsum(how, a, b, precision=precision(jnp.float32))
