"""Eviction: of the tokens, those that a scorer finds worth most stay as they are."""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.policies.top import largest, top
from lcx.cache.scorers.scorer import Scored, Scorer, scores_of

LARGE = 1e38  # beyond every score


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evict(Policy):
    """score: what tokens are worth. heads: whether key heads choose for themselves (`own`), or all by the mean of their scores
    (`shared`), so that one list serves them, or draw on one budget (`adaptive`: AdaKV, 2024), each with at least `safe` and at
    most `spread` of the mean. sinks: of each document, the first tokens, which always stay; recent: the newest, which do too.
    Both count to `keep`."""

    score: Scorer
    heads: Literal["own", "shared", "adaptive"] = "own"
    safe: float = 0.2
    spread: float = 2.0
    sinks: int = 0
    recent: int = 0

    def validate(self):
        super().validate()
        most = self.keep if isinstance(self.keep, int) else math.inf
        self.check(0 <= self.sinks <= most, "sinks", f"0 or more tokens, at most keep = {self.keep}, which they count to")
        self.check(0 <= self.safe <= 1, "safe", "a share from 0 to 1")
        self.check(self.spread >= 1, "spread", "at least 1, all heads alike")
        expected = f"0 or more tokens, at most {most - self.sinks}, or keep of at least {self.sinks + self.recent}"
        self.check(0 <= self.recent <= most - self.sinks, "recent", expected)

    @property
    def by_head(self):
        return self.heads != "shared"

    def slots(self, length, share):
        if self.heads != "adaptive" or self.scope == "decode":
            return super().slots(length, share)
        return min(length, math.ceil(self.most(length, share) * self.spread)) + self.every

    @property
    def queries(self):
        return self.score.queries

    @property
    def marks(self):
        return self.score.marks

    def mark(self, *pass_, **options):
        return self.score.mark(*pass_, **options)

    @property
    def raw(self):
        return self.score.raw

    @property
    def by_layer(self):
        return super().by_layer or self.score.by_layer

    def tables(self, layer, kv_heads, head_dim):
        return self.score.tables(layer, kv_heads, head_dim)

    @property
    def turned(self):
        return self.score.turned

    @property
    def expects_turns(self):
        return self.score.expects_turns

    def watch(self, watched, asked):
        return self.score.watch(watched, asked)

    def watching(self, rows, heads, head_dim):
        return self.score.watching(rows, heads, head_dim)

    def worth(self, now: Scored) -> Float[Array, "B G N"]:
        """Scores, -inf where there is no token. What always stays is on top: sinks, then the newest of the others, if a budget
        does not hold all of them."""
        scores = scores_of(self.score, now)
        if self.heads == "shared":
            scores = scores.mean(axis=1, keepdims=True)
        place = jnp.arange(scores.shape[2])
        stays = jnp.isposinf(scores) | (place >= now.count[..., None] - self.recent)
        scores = jnp.where(stays, LARGE * (1 + place / scores.shape[2]), scores)
        return jnp.where(now.there, jnp.where(now.info.index < self.sinks, jnp.inf, scores), -jnp.inf)

    def compress(self, now, slots):
        worth = self.worth(now)
        budget = jnp.broadcast_to(now.budget[:, None], worth.shape[:2])
        if self.heads == "adaptive":
            worth, budget = self._together(worth, now.budget, slots)
        index, there = top(worth, budget, slots)
        return Kept(index=index, there=there)

    def _together(self, worth: Float[Array, "B K N"], budget: Int[Array, "B"], slots: int):
        """Scores and budgets of heads that draw on one budget: each first its safe share, then the best of all."""
        B, K, N = worth.shape
        each = lambda x: jnp.broadcast_to(x[:, None], (B, K)).astype(jnp.int32)
        safe = largest(worth, each(budget * self.safe))
        most = largest(worth, each(jnp.minimum(slots, jnp.ceil(budget * self.spread))))
        joint = jnp.where(safe & most, jnp.inf, jnp.where(most, worth, -jnp.inf))
        chosen = largest(joint.reshape(B, K * N), budget * K).reshape(B, K, N)
        return jnp.where(chosen, worth, -jnp.inf), chosen.sum(axis=2)

    @classmethod
    def examples(cls):
        from lcx.cache.scorers.key_norm import KeyNorm
        from lcx.cache.scorers.snapkv import SnapKV

        return (
            cls(score=KeyNorm(), keep=6, every=2, sinks=1, recent=2),
            cls(score=SnapKV(window=3, kernel=3), keep=0.5, every=3, heads="shared"),
            cls(score=KeyNorm(), keep=8, every=2, heads="adaptive"),
        )
