"""Compactor (2025): keys that point where few do, and tokens that their neighbours look at; no question is needed.

score = blend z(leverage) + z(attention of neighbours),   z: mean 0 and deviation 1 over the tokens and heads of a row

First and newest tokens take no part in either, and stay. Without a blend it is the share of tokens that goes, as in kvpress.
"""

import dataclasses

import jax.numpy as jnp

from lcx.batch import PADDING
from lcx.cache.scorers.leverage import Leverage, leverage, standard
from lcx.cache.scorers.non_causal import weighed, within_chunks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compactor(Leverage):
    """blend: of the leverage scores; None is the share of the tokens read that goes. sinks: first tokens of a document;
    recent: the newest. chunk, kernel: as of NonCausal."""

    blend: float | None = None
    sinks: int = 8
    recent: int = 4
    chunk: int = 256
    kernel: int = 3

    def validate(self):
        super().validate()
        self.check(self.blend is None or self.blend >= 0, "blend", "0, a positive number or None")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")
        self.check(self.recent >= 0, "recent", "0 or more tokens")
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "an odd number")

    @property
    def marks(self):
        return "within chunks"

    def mark(self, asked, k, k_info, rule, new):
        real = asked.info.segments != PADDING
        behind = real.sum(axis=1, keepdims=True) - jnp.cumsum(real, axis=1)
        part = (asked.info.index >= self.sinks) & (behind >= self.recent)
        return within_chunks(asked, k, k_info, rule, new=new, size=self.chunk, part=part)

    def score(self, now):
        place = jnp.arange(now.k.shape[2])
        stays = (now.info.index < self.sinks) | (place >= now.count[..., None] - self.recent)
        part = now.there & ~stays
        blend = 1 - now.budget / jnp.maximum(now.seen, 1) if self.blend is None else jnp.full(now.seen.shape, self.blend)
        geometry = standard(leverage(now.raw, part, self.directions(now)), part)
        looked = standard(weighed(now, part, self.kernel), part)
        return jnp.where(stays, jnp.inf, jnp.maximum(blend, 0)[:, None, None] * geometry + looked)

    @classmethod
    def examples(cls):
        return (cls(sketch=6, chunk=8, sinks=2, recent=1),)
