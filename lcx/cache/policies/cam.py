"""CaM (2024): evicted tokens leave their values, in parts, with those kept right behind them, if they were looked at as much.

    m = the next `window` tokens that stay, of the same document,   A: attention received so far
    chance = min(1, A_e / mean of A over m)
    by that chance v_t <- v_t + v_e / |m| for t of m,   keys as they were

As in kvpress all heads keep the same tokens, which lose several at a time; there attention is counted in decoding alone, and of
more evicted than came since the last time those of highest score are merged alone. Here all are.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.kv_state import taken
from lcx.cache.picking import by_parts, cut_up
from lcx.cache.policies.evict import Evict
from lcx.cache.scorers.chance import Chance
from lcx.cache.scorers.scorer import Scored, received


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaM(Evict):
    """window: tokens that a value is spread over. seed: of the draws. heads: not `adaptive`."""

    window: int = 32
    seed: int = 0
    heads: Literal["own", "shared", "adaptive"] = "shared"

    def validate(self):
        super().validate()
        self.check(self.window >= 1, "window", "at least 1 token")
        self.check(0 <= self.seed < 1 << 32, "seed", "0 to 2^32 - 1")
        self.check(self.heads != "adaptive", "heads", "'own' or 'shared'")
        self.check(self.score.marks in ("", "received"), "score", "one that counts attention as it was received, or none")

    @property
    def marks(self):
        return "received"

    def mark(self, asked, k, k_info, rule, new):
        return received(asked, k, k_info, rule)

    def draws(self, now: Scored) -> Float[Array, "B K N"]:
        """Even chances from 0 to 1, the same for a token whenever it goes."""
        return Chance(seed=self.seed).score(now)

    def compress(self, now, slots):
        kept = super().compress(now, slots)
        (B, K, N, _), (_, G, C) = now.v.shape, kept.index.shape
        by_all = lambda x: jnp.broadcast_to(x, (B, K, *x.shape[2:]))
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(G)[:, None]
        stays = jnp.zeros((B, G, N), bool).at[rows, heads, jnp.where(kept.there, kept.index, N)].set(True, mode="drop")
        values, marks = taken((now.v, now.marks), by_all(kept.index))
        place, segments = jnp.arange(C), taken(now.info.segments, kept.index)[:, :, None]

        def behind(start, own):
            """Which of those that stay tokens may join [B, K, n, C]."""
            near = (place >= start[..., None]) & (place < start[..., None] + self.window) & kept.there[:, :, None]
            return by_all((near & (own[..., None] == segments)).astype(jnp.float32))

        def seen(start, own):
            found = behind(start, own)
            several = found.sum(axis=3)
            return several, jnp.einsum("bknc,bkc->bkn", found, marks, precision="highest") / jnp.maximum(several, 1)

        start = jnp.cumsum(stays, axis=2)  # of those that stay, the first behind
        several, mean = by_parts(seen, start, now.info.segments, size=128)
        chance = jnp.where(mean > 0, now.marks / jnp.where(mean > 0, mean, 1), now.marks > 0)
        merged = by_all(now.there & ~stays) & (several > 0) & (self.draws(now) < chance)
        leaves = (merged / jnp.maximum(several, 1))[..., None] * now.v
        add = lambda sums, part: (sums + jnp.einsum("bknc,bkne->bkce", behind(*part[:2]), part[2], precision="highest"), None)
        parts = cut_up((start, now.info.segments, leaves), size=128)
        sums, _ = jax.lax.scan(add, jnp.zeros_like(values), parts)
        return dataclasses.replace(kept, v=values + sums)

    @classmethod
    def examples(cls):
        from lcx.cache.scorers.key_norm import KeyNorm

        return (cls(score=KeyNorm(), keep=8, every=2, window=3),)
