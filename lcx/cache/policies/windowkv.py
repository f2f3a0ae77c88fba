"""WindowKV (2025): of a prompt whole windows stay, chosen by what its last tokens look at, for all heads and a group of layers.

    a_j = sum over the suffix's queries of p_ij,   the suffix itself stays, beside the budget
    a window's score is the mean over heads of its largest a_j, half of them (`localization`: answers stand in one place), or
    of all (`aggregation`);   all but the ceil((tokens - budget) / window) lowest stay

The first layer of a group chooses, the others hold what it holds; budgets fall from group to group. The authors tell the task
by a classifier; here it is a field.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool

from lcx.batch import PADDING
from lcx.cache.policies.budgets import LayerBudgets, Pyramid
from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.policies.top import top
from lcx.cache.scorers.scorer import Scored

SUFFIX = {"localization": 32, "aggregation": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowKV(Policy):
    """task: what the prompt is read for. window: tokens. suffix: the newest tokens, whose queries choose; None is 32, or 16 to
    aggregate. layers: the budgets of groups, which share one choice."""

    task: Literal["localization", "aggregation"] = "localization"
    window: int = 8
    suffix: int | None = None
    layers: LayerBudgets = Pyramid(beta=14.0, group=8)

    def validate(self):
        super().validate()
        self.check(self.window >= 1, "window", "at least 1 token")
        self.check(self.suffix is None or self.suffix >= 1, "suffix", "at least 1 token, or None")

    @property
    def by_head(self):
        return False

    @property
    def queries(self):
        return SUFFIX[self.task] if self.suffix is None else self.suffix

    def most(self, length, share):
        return min(super().most(length, share) + self.queries, length)

    def budget(self, seen, share):
        return super().budget(seen, share) + self.queries

    def leader(self, layer: int) -> int | None:
        group = getattr(self.layers, "group", 1)
        return layer - layer % group if layer % group else None

    def compress(self, now, slots):
        kept = self._chosen(now) if now.leader is None else _held(now)
        worth = jnp.where(now.there & kept[:, None], 1.0, -jnp.inf)
        index, there = top(worth, jnp.full(worth.shape[:2], slots), slots)
        return Kept(index=index, there=there)

    def _chosen(self, now: Scored) -> Bool[Array, "B N"]:
        N, w = now.k.shape[2], self.window
        place, count = jnp.arange(N), now.count[:, 0]
        review = jnp.maximum(count - self.queries, 0)
        looked = now.looked(self.queries)
        looked = jnp.where(place < review[:, None, None, None], looked, 0)
        looked = looked.reshape(len(count), -1, N)
        windows = jnp.pad(looked, ((0, 0), (0, 0), (0, -N % w))).reshape(*looked.shape[:2], -1, w)
        size = jnp.clip(review[:, None] - jnp.arange(windows.shape[2]) * w, 0, w)  # of the last what is there
        counted = jnp.maximum(size if self.task == "aggregation" else jnp.minimum(size, max(w // 2, 1)), 1)
        ranked = -jnp.sort(-windows, axis=3)
        score = jnp.where(jnp.arange(w) < counted[:, None, :, None], ranked, 0).sum(axis=3) / counted[:, None]
        score = jnp.where(size > 0, score.mean(axis=1), -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-score, axis=1, stable=True), axis=1)
        over = jnp.maximum(review - (now.budget - self.queries), 0)
        stay = -(-review // w) - -(-over // w)
        kept = jnp.repeat(rank < stay[:, None], w, axis=1)[:, :N]
        return kept | (place >= review[:, None])

    @classmethod
    def examples(cls):
        return (
            cls(keep=12, every=2, window=3, suffix=3, layers=Pyramid(beta=2.0, group=1)),
            cls(keep=0.5, every=2, window=4, suffix=2, task="aggregation", layers=Pyramid(beta=2.0, group=1)),
        )


def _held(now: Scored) -> Bool[Array, "B N"]:
    """The tokens that the leading layer holds."""
    own, led = (jnp.stack([info.segments[:, 0], info.index[:, 0]]) for info in (now.info, now.leader))
    same = (own[..., None] == led[..., None, :]).all(axis=0) & (led[0] != PADDING)[:, None]
    return same.any(axis=2)
