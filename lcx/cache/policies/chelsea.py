"""Chelsea (2025, later CentroidKV): tokens of a chunk whose keys are alike become one, their mean.

    A, B: tokens of even and odd places in the chunk;   each A to the B of the most similar key, by cosine
    of these links the strongest are kept;   a B and the A's linked to it become their mean, keys and values, in B's place

A round halves a chunk at most; rounds go on until the budget is met. Means are weighted by how many tokens each stands for, and
attention counts it so many times: log n is added to its logit (both inferred: the abstract says neither). Sinks and recent
tokens are not merged, nor those of two documents. Keys are merged as they are held: rotated ones have turned apart, so chunks
are short. What is still beyond the budget is dropped, the oldest behind the sinks first.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.cache.kv_state import taken
from lcx.cache.picking import places
from lcx.cache.policies.policy import Kept, Policy
from lcx.cache.scorers.key_difference import unit
from lcx.record import record
from pallas_kernels.token_gather.op import gathered


@record
class Merged:
    """Tokens in front, oldest first. origin: places among those before the first round. segments: their documents."""

    k: Float[Array, "B K N D"]
    v: Float[Array, "B K N E"]
    counts: Float[Array, "B K N"]
    origin: Int[Array, "B K N"]
    segments: Int[Array, "B K N"]
    count: Int[Array, "B K"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chelsea(Policy):
    """chunk: tokens that are matched among themselves, an even number. sinks, recent: first and newest tokens, left alone.
    mass: whether attention counts a mean as the tokens that it stands for, or as `one`. rounds: at most."""

    chunk: int = 32
    sinks: int = 4
    recent: int = 32
    mass: Literal["counted", "one"] = "counted"
    rounds: int = 8

    def validate(self):
        super().validate()
        self.check(self.chunk >= 2 and self.chunk % 2 == 0, "chunk", "an even number of tokens")
        most = self.keep - 1 if isinstance(self.keep, int) else math.inf
        self.check(0 <= self.sinks <= most, "sinks", f"0 or more tokens, below keep = {self.keep}, which they count to")
        expected = f"0 or more tokens, at most {most - self.sinks}, or keep of at least {self.sinks + self.recent + 1}"
        self.check(0 <= self.recent <= most - self.sinks, "recent", expected)
        self.check(self.rounds >= 1, "rounds", "at least 1")

    @property
    def by_head(self):
        return True

    @property
    def merges(self):
        return True

    @property
    def weighs(self):
        return self.mass == "counted"

    def compress(self, now, slots):
        B, K, N, _ = now.k.shape
        origin = jnp.broadcast_to(jnp.arange(N), (B, K, N))
        segments, count = jnp.broadcast_to(now.info.segments, (B, K, N)), jnp.broadcast_to(now.count, (B, K))
        begin = Merged(k=now.raw, v=now.v, counts=now.counts, origin=origin, segments=segments, count=count)
        budget = jnp.broadcast_to(now.budget[:, None], (B, K))

        def more(state):
            turn, merged = state
            return (turn < self.rounds) & (merged.count > budget).any()

        _, merged = jax.lax.while_loop(more, lambda state: (state[0] + 1, self._round(state[1], budget)), (0, begin))
        beyond, place = jnp.maximum(merged.count - budget, 0)[..., None], jnp.arange(slots)
        place = jnp.where(place < jnp.minimum(self.sinks, budget - 1)[..., None], place, place + beyond)
        cut = functools.partial(taken, place=jnp.minimum(place, N - 1))
        there = jnp.arange(slots) < jnp.minimum(merged.count, budget)[..., None]
        return Kept(index=cut(merged.origin), there=there, k=cut(merged.k), v=cut(merged.v), counts=cut(merged.counts))

    def _round(self, now: Merged, budget: Int[Array, "B K"]) -> Merged:
        """With each chunk's strongest links merged, as many in every chunk as the budget asks for."""
        B, K, N, _ = now.k.shape
        begin = min(self.sinks, N)
        half, size = self.chunk // 2, -(-(N - begin) // self.chunk) * self.chunk
        cut = lambda x: jnp.pad(x[:, :, begin:], ((0, 0), (0, 0), (0, size - N + begin)) + ((0, 0),) * (x.ndim - 3))
        apart = lambda x: cut(x).reshape(B, K, -1, half, 2, *x.shape[3:])
        place = jnp.arange(N)
        free = (place >= self.sinks) & (place < now.count[..., None] - self.recent)
        free, keys, values, counts, segments = map(apart, (free, now.k, now.v, now.counts, now.segments))
        excess = now.count - budget
        chunks = jnp.maximum(free.any(axis=(3, 4)).sum(axis=2), 1)
        links = jnp.maximum(-(-excess // chunks), 0)[..., None, None]
        joins, target = matched(keys, free, segments, jnp.minimum(links, half))
        joins = joins & (jnp.cumsum(joins.reshape(B, K, -1), axis=2).reshape(joins.shape) <= excess[..., None, None])
        to = jax.nn.one_hot(target, half) * (joins * counts[..., 0])[..., None]  # [.., A, B] weights
        total = counts[..., 1] + to.sum(axis=3)
        mean = lambda x: (
            x[..., 1, :] * counts[..., 1, None] + jnp.einsum("bkcij,bkcid->bkcjd", to, x[..., 0, :], precision="highest")
        )
        merged = lambda x: jnp.stack([x[..., 0, :], mean(x) / jnp.maximum(total, 1e-30)[..., None]], axis=4)
        back = lambda x: x.reshape(B, K, size, *x.shape[5:])[:, :, : N - begin]
        join = lambda old, new: jnp.concatenate([old[:, :, :begin], back(new)], axis=2)
        gone = jnp.stack([joins, jnp.zeros_like(joins)], axis=4)
        there = (place < now.count[..., None]) & ~join(jnp.zeros((B, K, N), bool), gone)
        take = functools.partial(gathered, index=places(there, N), growing=True)
        return Merged(
            k=take(join(now.k, merged(keys))),
            v=take(join(now.v, merged(values))),
            counts=take(join(now.counts, jnp.stack([counts[..., 0], total], axis=4))),
            origin=take(now.origin),
            segments=take(now.segments),
            count=there.sum(axis=2),
        )

    @classmethod
    def examples(cls):
        return (cls(keep=10, every=2, chunk=4, sinks=1, recent=2), cls(keep=0.4, chunk=8, sinks=0, recent=0, mass="one"))


def matched(
    keys: Float[Array, "B K c half 2 D"],
    free: Bool[Array, "B K c half 2"],
    segments: Int[Array, "B K c half 2"],
    links: Int[Array, "B K 1 1"],
) -> tuple[Bool[Array, "B K c half"], Int[Array, "B K c half"]]:
    """(whether each even token joins an odd one of its document, which): of each chunk the `links` most alike, as in ToMe."""
    alike = jnp.einsum("bkcid,bkcjd->bkcij", unit(keys[..., 0, :]), unit(keys[..., 1, :]), precision="highest")
    may = free[..., 0][..., None] & free[..., 1][..., None, :] & (segments[..., 0][..., None] == segments[..., 1][..., None, :])
    alike = jnp.where(may, alike, -jnp.inf)
    best, target = alike.max(axis=4), alike.argmax(axis=4)
    rank = jnp.argsort(jnp.argsort(-best, axis=3, stable=True), axis=3)
    return (best > -jnp.inf) & (rank < links), target
