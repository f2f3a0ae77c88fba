"""Clusters of a prefix's keys, and what a query finds each worth.

    S_i = exp(scale q.C_i) / sum_j n_j exp(scale q.C_j)

is what a token of cluster i would get of the attention to the prefix if all its tokens had their mean C_i for key; n_j tokens
are in each. All is in logarithms, so that no number is too large or too small.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.cache.scorers.scorer import Rule
from lcx.record import record

AT_ONCE = 64  # queries whose scores of all clusters exist at once


@record
class Level:
    """Clusters: the means of their keys, tokens of each, and the logarithms of the thresholds of passes of several tokens and
    of one."""

    k: Float[Array, "B K C D"]
    counts: Int[Array, "B K C"]
    bounds: Float[Array, "B K 2"]


@record
class Clusters:
    """labels: the cluster of each slot, -1 where it is always read. parents: the coarse cluster of each."""

    labels: Int[Array, "B K S"]
    fine: Level
    parents: Int[Array, "B K C"] | None
    coarse: Level | None


def scores(
    q: Float[Array, "B T H D"], k: Float[Array, "B K C D"], counts: Int[Array, "B K C"], rule: Rule
) -> Float[Array, "B K g T C"]:
    """Logarithms of S of single queries; -inf for clusters without tokens."""
    (B, T, H, D), K = q.shape, k.shape[1]
    q = q.astype(jnp.float32).reshape(B, T, K, H // K, D) * rule.scale
    s = jnp.einsum("btkgd,bkcd->bkgtc", q, k.astype(jnp.float32), precision="highest")
    s = s if rule.softcap is None else rule.softcap * jnp.tanh(s / rule.softcap)
    counts = counts[:, :, None, None]
    total = jax.nn.logsumexp(s, b=counts, axis=-1, keepdims=True)
    return jnp.where(counts > 0, s - jnp.where(total > -jnp.inf, total, 0), -jnp.inf)


def mean_scores(
    q: Float[Array, "B T H D"], sees: Bool[Array, "B T"], k: Float[Array, "B K C D"], counts: Int[Array, "B K C"], rule: Rule
) -> Float[Array, "B K C"]:
    """Logarithms of the mean of S over the queries that see the prefix, and the heads of a group; -inf without any."""
    T, at_once = q.shape[1], min(AT_ONCE, q.shape[1])
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % at_once)) + ((0, 0),) * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(len(x), -1, at_once, *x.shape[2:]), 1, 0)

    def some(part):
        q, sees = part
        each = jnp.where(sees[:, None, None, :, None], scores(q, k, counts, rule), -jnp.inf)
        return jax.nn.logsumexp(each, axis=(2, 3))

    total = jax.nn.logsumexp(jax.lax.map(some, (cut(q), cut(sees))), axis=0)
    group = q.shape[2] // k.shape[1]
    return total - jnp.log(jnp.maximum(sees.sum(axis=1), 1) * group)[:, None, None]


def means(
    x: Float[Array, "K N D"], labels: Int[Array, "K N"], weight: Int[Array, "K N"], most: int
) -> tuple[Float[Array, "K C D"], Int[Array, "K C"]]:
    """(means, 0 of none, and sums of weights) of what is labelled alike, in `most` clusters; -1 is in none."""

    def head(x, labels, weight):
        place = jnp.where(labels < 0, most, labels)
        total = jnp.zeros((most, x.shape[1])).at[place].add(x, mode="drop")
        size = jnp.zeros(most, jnp.int32).at[place].add(1, mode="drop")
        return total / jnp.maximum(size, 1)[:, None], jnp.zeros(most, jnp.int32).at[place].add(weight, mode="drop")

    return jax.vmap(head)(x, labels, weight)
