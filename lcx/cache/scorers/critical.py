"""CriticalKV (2025): beside the tokens that are looked at most, those whose values change the output most.

of the budget the first half by score;   of the others by (score + epsilon) |W_o v|_1, a mean over the heads of the group
"""

import dataclasses

import jax.numpy as jnp

from lcx.cache.picking import by_parts
from lcx.cache.policies.top import largest
from lcx.cache.scorers.scorer import Wrapper, scores_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critical(Wrapper):
    """first: the share of the budget that goes by score alone. epsilon: added to scores before they meet a norm."""

    first: float = 0.5
    epsilon: float = 1e-4

    def validate(self):
        self.check(0 <= self.first <= 1, "first", "a share from 0 to 1")
        self.check(self.epsilon >= 0, "epsilon", "0 or a positive number")

    def score(self, now):
        scores = jnp.where(now.there, scores_of(self.of, now), -jnp.inf)
        first = (now.budget * self.first).astype(jnp.int32).reshape(len(scores), -1)
        first = largest(scores, jnp.broadcast_to(first, scores.shape[:2]))
        K, output = now.v.shape[1], now.output.astype(jnp.float32)
        weights = output.reshape(K, -1, *output.shape[1:])
        norm = lambda v, n: jnp.abs(jnp.einsum("bkne,kem->bknm", v, weights[:, n], precision="highest")).sum(axis=3)
        norms = by_parts(lambda v: sum(norm(v, n) for n in range(weights.shape[1])) / weights.shape[1], now.v, size=256)
        return jnp.where(first | jnp.isposinf(scores), jnp.inf, (scores + self.epsilon) * norms)

    @classmethod
    def examples(cls):
        from lcx.cache.scorers.snapkv import SnapKV

        return (cls(of=SnapKV(window=2, kernel=3)),)
