"""SimLayerKV (2024): a layer whose last query looks at the first and newest tokens alone is lazy, and keeps no others.

    m = mean over heads of sum over the first `sinks` and the newest `recent` tokens, its own among them, of p_j
    lazy: m > threshold

As the authors' code for decoding; kvpress leaves the last token itself out of m and keeps two tokens fewer than it judges by.
Each row decides for itself, at the end of every pass of several tokens. All layers have slots for all tokens, as which are lazy
is not known before: what is saved is reading, of spans behind the last slot in use.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.policies.budgets import Even, LayerBudgets
from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.policies.top import top
from lcx.cache.scorers.scorer import Scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimLayerKV(Policy):
    """threshold: the authors' are 0.9 of Llama-3, 0.65 of Llama-2, 0.8 of Mistral, 0.85 of Qwen. sinks: first tokens of a
    document. keep: all, of a layer that is not lazy. scope: not decoding, in which it drops nothing."""

    threshold: float = 0.9
    sinks: int = 4
    recent: int = 1024
    keep: int | float = 1.0
    scope: Literal["prefill", "decode", "both"] = "both"
    layers: LayerBudgets = Even()

    def validate(self):
        super().validate()
        self.check(0 <= self.threshold <= 1, "threshold", "a share of attention, from 0 to 1")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")
        self.check(self.recent >= 1, "recent", "at least 1 token")
        self.check(type(self.keep) is float and self.keep == 1, "keep", "1.0: a layer that is not lazy keeps all")
        self.check(self.scope == "both", "scope", "'both': it chooses in passes of several tokens, and an answer has room")
        self.check(self.layers == Even(), "layers", "Even(), as queries say which layers keep less")

    @property
    def by_head(self):
        return False

    @property
    def queries(self):
        return 1

    def slots(self, length, share):
        return length

    def full(self, used, seen, share, known):
        return jnp.zeros(len(used), bool)

    def mass(self, now: Scored) -> Float[Array, "B"]:
        """m of each row."""
        return jnp.where(self._edges(now), now.attention(1).mean(axis=(1, 2, 3))[:, None], 0).sum(axis=(1, 2))

    def _edges(self, now: Scored):
        return (now.info.index < self.sinks) | (jnp.arange(now.k.shape[2]) >= now.count[..., None] - self.recent)

    def compress(self, now, slots):
        lazy = (self.mass(now) > self.threshold)[:, None, None]
        worth = jnp.where(now.there & (self._edges(now) | ~lazy), 1.0, -jnp.inf)
        index, there = top(worth, jnp.full(worth.shape[:2], slots), slots)
        return Kept(index=index, there=there)

    @classmethod
    def examples(cls):
        return (cls(threshold=0.4, sinks=1, recent=8),)
