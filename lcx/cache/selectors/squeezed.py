"""Squeezed Attention (2024): of a long prefix, clustered once, the clusters that a query looks at are read.

    S_i = exp(scale q.C_i) / sum_j n_j exp(scale q.C_j)     what a token of cluster i would get, C_i the mean of its n_i keys

The clusters are those of the directions of keys, of each key head its own. A cluster is read where S_i, the mean over the
queries of a pass and the heads of a group, is above one threshold of all layers and heads: a quantile over the tokens of the
prefix, for its last queries (`lcx.inference.squeeze`). The last tokens of the prefix and all behind it are always read.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import Causal, tokens_of
from lcx.batch import PADDING, TokenInfo
from lcx.cache.kv_state import hidden
from lcx.cache.layered import rows_from
from lcx.cache.scorers.scorer import Rule
from lcx.cache.selectors.clusters import Clusters, Level, mean_scores, means
from lcx.cache.selectors.kmeans import directions, kmeans
from lcx.cache.selectors.pages import of_pages
from lcx.cache.selectors.selector import Selector
from lcx.record import replaced
from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coarse(Spec):
    """A level of clusters of clusters, asked first. clusters: as a share of the tokens. quantile: of those not read. As in the
    authors' code both thresholds are of the scores among all clusters, so that the share read is not quite that asked for."""

    clusters: float = 0.01
    quantile: float = 0.5

    def validate(self):
        self.check(0 < self.clusters <= 1, "clusters", "a share above 0, at most 1.0")
        self.check(0 <= self.quantile < 1, "quantile", "a share from 0, below 1")

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Squeezed(Selector):
    """clusters: as a share of the tokens that are clustered. observed: the last tokens of the prefix, which are not, and whose
    queries tell the threshold. quantile: the share of tokens that is not read, in the mean over heads, layers and those
    queries; 0 reads all. coarse: a level above; its survivors alone are in the sum over j below. calibrated: whether the
    threshold of a token alone is of the scores of single queries, or of their mean too, as in the authors' code. gathered: the
    share of slots that are fetched and copied for every key head, whatever it reads of them; where some head needs more, all
    are gone over, those it does not read out of sight, which gives the same. page: slots that are fetched together, blocks of
    the codec. rounds: of k-means, at most."""

    page: int = 1
    dense_layers: int = 0
    clusters: float = 0.05
    coarse: Coarse | None = None
    observed: int = 100
    quantile: float = 0.9
    calibrated: Literal["alone", "mean"] = "alone"
    gathered: float = 0.25
    rounds: int = 300
    seed: int = 0

    def validate(self):
        super().validate()
        for field in ("clusters", "gathered"):
            self.check(0 < getattr(self, field) <= 1, field, "a share above 0, at most 1.0")
        self.check(0 <= self.quantile < 1, "quantile", "a share from 0, below 1")
        for field in ("observed", "rounds"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(0 <= self.seed < 1 << 32, "seed", "0 to 2^32 - 1")
        above = self.coarse is None or self.coarse.clusters <= self.clusters
        self.check(above, "coarse", f"fewer clusters than clusters = {self.clusters}, which they are made of")

    @property
    def queries(self):
        return self.observed

    @property
    def several(self):
        return True

    @property
    def prepared(self):
        return True

    def number(self, tokens: int, share: float) -> int:
        """Clusters of so many tokens."""
        return max(1, math.floor(share * tokens + 1e-9))

    def told(self, cache, held, tables, frequencies, place=None, layer=None):
        """Nothing clustered yet, so that all is read; nothing new of slots behind the prefix."""
        if place is not None:
            return held
        keys = jax.eval_shape(lambda: cache.coders[0].decode(held.k, tables[0]))
        B, K, S, D = keys.shape

        def level(share: float) -> Level:
            C = self.number(S, share)
            return Level(
                k=jnp.zeros((B, K, C, D), keys.dtype),
                counts=jnp.zeros((B, K, C), jnp.int32),
                bounds=jnp.full((B, K, 2), -jnp.inf),
            )

        fine, above = level(self.clusters), self.coarse is not None
        return dataclasses.replace(
            held,
            pages=Clusters(
                labels=jnp.full((B, K, S), -1, jnp.int32),
                fine=fine,
                parents=jnp.zeros_like(fine.counts) if above else None,
                coarse=level(self.coarse.clusters) if above else None,
            ),
        )

    def clustered(
        self,
        told: Clusters,
        k: Float[Array, "B K S D"],
        there: Bool[Array, "B S"],
        number: Int[Array, "B"],
        above: Int[Array, "B"],
        key: Array,
    ) -> Clusters:
        """Of rotated keys, those that are `there`, in so many clusters, and so many clusters `above`; no thresholds yet."""
        keys = jax.vmap(lambda head: jax.random.split(jax.random.fold_in(key, head)))(jnp.arange(k.shape[1]))

        def row(given):
            k, there, number, above = given
            by_head = lambda x, there, number, key, most: jax.vmap(
                lambda x, there, key: kmeans(directions(x), there, number, key, most=most, rounds=self.rounds)
            )(x, there, key)
            there = jnp.broadcast_to(there, k.shape[:2])
            labels = by_head(k, there, number, keys[:, 0], told.fine.k.shape[2])
            mean, counts = means(k, labels, jnp.ones_like(labels), told.fine.k.shape[2])
            found = (labels, mean, counts)
            if told.coarse is None:
                return *found, None, None, None
            real = jnp.broadcast_to(jnp.arange(mean.shape[1]) < number, counts.shape)
            parents = by_head(mean, real, above, keys[:, 1], told.coarse.k.shape[2])
            tops, _ = means(mean, parents, jnp.ones_like(parents), told.coarse.k.shape[2])
            tokens = means(mean, parents, counts, told.coarse.k.shape[2])[1]
            return *found, jnp.maximum(parents, 0), tops, tokens

        labels, mean, counts, parents, tops, tokens = jax.lax.map(row, (k.astype(jnp.float32), there, number, above))
        level = lambda old, k, counts: replaced(old, k=k.astype(old.k.dtype), counts=counts)
        coarse = None if told.coarse is None else level(told.coarse, tops, tokens)
        return Clusters(labels=labels, fine=level(told.fine, mean, counts), parents=parents, coarse=coarse)

    def chosen(self, q: Float[Array, "B T H D"], sees: Bool[Array, "B T"], told: Clusters, rule: Rule) -> Bool[Array, "B K C"]:
        """The clusters that a pass reads, by the queries that see them."""
        pass_ = int(q.shape[1] == 1)
        counts, passes = told.fine.counts, True
        if told.coarse is not None:
            tops = mean_scores(q, sees, told.coarse.k, told.coarse.counts, rule) > told.coarse.bounds[..., pass_, None]
            passes = jnp.take_along_axis(tops, told.parents, axis=2)
            counts = jnp.where(passes, counts, 0)
        return passes & self.best(mean_scores(q, sees, told.fine.k, counts, rule), counts, told.fine.bounds[..., pass_, None])

    def best(
        self, scores: Float[Array, "B K C"], counts: Int[Array, "B K C"], bounds: Float[Array, "B K 1"]
    ) -> Bool[Array, "B K C"]:
        """Of clusters of so many tokens, those that are read. scores, bounds: logarithms."""
        return scores > bounds

    def found(self, find, q, q_info, rule, told, coded, info, axes=(), first=0):
        if axes or rule.mask != Causal() or rule.bias is not None:
            raise ValueError(f"{type(self).__name__}: expected slots on one device, mask = Causal() and no distance_bias")
        info = rows_from(info, first, len(q))
        read = self.read(q, q_info, rule, told, info)
        (B, K, S), size = read.shape, self.page
        pages, most = read.reshape(B, K, S // size, size).any(axis=3), math.ceil(self.gathered * (S // size))
        rank = jnp.where(pages, jnp.cumsum(pages, axis=2) - 1, most)
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(K)[:, None]
        place = jnp.zeros((B, K, most), jnp.int32).at[rows, heads, rank].set(jnp.arange(S // size), mode="drop")
        info = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, K, *x.shape[2:])), info)

        def some():
            part = of_pages(coded, place, S // size, first)
            at, wanted = of_pages((info, read), place, S // size)
            filled = jnp.arange(most) < pages.sum(axis=2, keepdims=True)
            return find(part, hidden(at, wanted & jnp.repeat(filled, size, axis=2)))

        return jax.lax.cond(pages.sum(axis=2).max() <= most, some, lambda: find(coded, hidden(info, read), first))

    def read(
        self, q: Float[Array, "B T H D"], q_info: TokenInfo, rule: Rule, told: Clusters, info: TokenInfo
    ) -> Bool[Array, "B K S"]:
        """The slots that the queries of a pass read."""
        one = jnp.argmax(told.labels[:, 0] >= 0, axis=1)[:, None, None]  # sees it, sees the prefix
        prefix = jax.tree.map(lambda x: jnp.take_along_axis(x[:, 0, None], one, axis=2), tokens_of(info))
        sees = rule.mask.visible(tokens_of(q_info).rows(), prefix)[..., 0]
        chosen = self.chosen(q, sees, told, rule)
        clusters = jnp.take_along_axis(chosen, jnp.maximum(told.labels, 0), axis=2)
        return ((told.labels < 0) | clusters) & (info.segments != PADDING)

    @classmethod
    def examples(cls):
        return cls(observed=4, quantile=0.5), cls(observed=4, clusters=0.5, coarse=Coarse(clusters=0.2), gathered=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SqueezedHeads(Squeezed):
    """To compare with: every key head reads as many of its tokens, all but the share `quantile`, in its best clusters, or in
    any, drawn anew for each pass."""

    by: Literal["score", "chance"] = "score"

    def validate(self):
        super().validate()
        self.check(self.coarse is None, "coarse", "None where each head has its share, whatever a level above says")

    def best(self, scores, counts, bounds):
        if self.by == "chance":
            bits = jax.lax.bitcast_convert_type(scores.max(axis=2), jnp.int32)
            draw = lambda bits: jax.random.uniform(jax.random.fold_in(jax.random.key(self.seed), bits), scores.shape[2:])
            scores = jax.vmap(jax.vmap(draw))(bits)
        order = jnp.argsort(-scores, axis=2, stable=True)
        held = jnp.cumsum(jnp.take_along_axis(counts, order, axis=2), axis=2)
        fits = held <= jnp.ceil((1 - self.quantile) * held[..., -1:])
        return jnp.take_along_axis(fits, jnp.argsort(order, axis=2), axis=2)

    @classmethod
    def examples(cls):
        return (cls(observed=4, quantile=0.5, clusters=0.3),)
