"""Expected attention (kvpress, 2025): what queries to come will look at, if they are drawn like those so far.

    q ~ N(mu, C) before its rotation,   R = mean rotation over the next `ahead` positions
    e_j = exp(scale R mu . k_j + scale^2 / 2 k_j^T R C R^T k_j),   score_j = mean over the group of (e_j / sum e) |v_j|

Sinks take no part and stay.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from lcx.batch import PADDING
from lcx.cache.picking import by_parts
from lcx.cache.scorers.scorer import Scorer, mean_of_group
from lcx.positions.rotate import tables, turned_by


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
    """ahead: positions of queries to come. sinks: first tokens of a document, left out and kept. values: whether shares are
    times the `norm` of a token's value."""

    ahead: int = 512
    values: Literal["norm", "left out"] = "norm"
    sinks: int = 4

    def validate(self):
        self.check(self.ahead >= 1, "ahead", "at least 1 position")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")

    @property
    def expects_turns(self):
        return True

    def watching(self, rows, heads, head_dim):
        zeros = lambda *shape: jnp.zeros((rows, *shape))
        return {"count": zeros(), "sum": zeros(heads, head_dim), "square": zeros(heads, head_dim, head_dim)}

    def watch(self, watched, asked):
        real = (asked.info.segments != PADDING) & (asked.info.index >= self.sinks)
        q = jnp.where(real[..., None, None], asked.raw.astype(jnp.float32), 0)
        square = jnp.einsum("bthd,bthe->bhde", q, q, precision="highest")
        new = {"count": real.sum(axis=1).astype(jnp.float32), "sum": q.sum(axis=1), "square": square}
        return {name: watched[name] + new[name] for name in watched}

    def score(self, now):
        watched, (B, K), scale = now.watched, now.k.shape[:2], now.rule.scale
        count = jnp.maximum(watched["count"], 1)[:, None, None]
        mean = watched["sum"] / count
        spread = watched["square"] / count[..., None] - mean[..., :, None] * mean[..., None, :]
        if now.frequencies is not None:
            places = (now.seen[:, None] + jnp.arange(self.ahead)).astype(jnp.float32)[..., None]
            lengths = None if not now.frequencies.by_length else jnp.broadcast_to(now.seen[:, None], places.shape[:2])
            cosine, sine = (x.mean(axis=1)[:, None, None] for x in tables(places, now.frequencies, lengths))
            turn = lambda x: turned_by(x, cosine, sine, now.frequencies)
            mean = turn(mean[:, None])[:, 0]
            spread = turn(jnp.swapaxes(turn(spread), 2, 3))
        by_group = lambda x: x.reshape(B, K, -1, *x.shape[2:])

        def logits(k):
            along = jnp.einsum("bkgd,bknd->bkng", by_group(mean), k, precision="highest")
            around = jnp.einsum("bknd,bkgde,bkne->bkng", k, by_group(spread), k, precision="highest")
            return scale * along + scale**2 / 2 * around

        logit = jnp.moveaxis(by_parts(logits, now.k, size=2048), 3, 2)
        sink = now.info.index < self.sinks
        logit = jnp.where((now.there & ~sink)[:, :, None], logit, -jnp.inf)
        top = logit.max(axis=-1, keepdims=True)
        found = jnp.exp(logit - jnp.where(jnp.isneginf(top), 0, top))
        share = mean_of_group(found / jnp.maximum(found.sum(axis=-1, keepdims=True), 1e-30))
        norm = jnp.linalg.norm(now.v, axis=-1) if self.values == "norm" else 1.0
        return jnp.where(sink, jnp.inf, share * norm)

    @classmethod
    def examples(cls):
        return (cls(ahead=16, sinks=1),)
