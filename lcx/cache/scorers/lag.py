"""LagKV (2025): tokens that stand out from the range of the block behind theirs.

    u = (x - min of the next block) / (max - min),   a = softmax over the block of the deviation of u over channels
    score = rank within the block of (a of keys + a of values) / 2, as a share of it

Sinks, the last whole block and what is behind it stay.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lag(Scorer):
    """block: tokens. sinks: first tokens of a row, in no block."""

    block: int = 128
    sinks: int = 4

    def validate(self):
        self.check(self.block >= 2, "block", "at least 2 tokens")
        self.check(self.sinks >= 0, "sinks", "0 or more tokens")

    def score(self, now):
        (B, K, N, _), L = now.k.shape, self.block
        blocks = max(N - self.sinks, 0) // L
        place = jnp.broadcast_to(jnp.arange(N, dtype=jnp.float32), (B, K, N))
        newer = jnp.where(place < self.sinks, jnp.inf, 1 + place / max(N, 1))  # of what is not scored the newest first
        if blocks < 2:
            return newer
        cut = lambda x: x[:, :, self.sinks : self.sinks + blocks * L].reshape(B, K, blocks, L, -1)
        mean = (_stands_out(cut(now.k)) + _stands_out(cut(now.v))) / 2
        rank = jnp.argsort(jnp.argsort(mean, axis=-1), axis=-1).reshape(B, K, -1) / L
        end = self.sinks + (blocks - 1) * L
        rank = jnp.pad(rank, ((0, 0), (0, 0), (self.sinks, N - end)))
        whole = (place - self.sinks) // L  # the block of a token, which the next of has to be there in full
        scored = (place >= self.sinks) & (self.sinks + (whole + 2) * L <= now.count[..., None])
        return jnp.where(scored, rank, newer)

    @classmethod
    def examples(cls):
        return (cls(block=4, sinks=2),)


def _stands_out(x: Float[Array, "B K blocks L D"]) -> Float[Array, "B K before L"]:
    """Of all blocks but the last."""
    low, high = (f(x[:, :, 1:], axis=3, keepdims=True) for f in (jnp.min, jnp.max))
    range_ = high - low
    u = (x[:, :, :-1] - low) / jnp.where(range_ == 0, 1, range_)
    return jax.nn.softmax(u.std(axis=-1, ddof=1), axis=-1)
