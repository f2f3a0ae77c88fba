"""Chance: what stays is drawn, the same for a token whenever it is asked. The floor of every comparison."""

import dataclasses

import jax
import jax.numpy as jnp

from lcx.cache.scorers.scorer import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chance(Scorer):
    """seed: of the draws."""

    seed: int = 0

    def validate(self):
        self.check(0 <= self.seed < 1 << 32, "seed", "0 to 2^32 - 1")

    def score(self, now):
        heads = jnp.arange(now.k.shape[1])[:, None]
        draw = lambda head, index: jax.random.uniform(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), head), index)
        )
        index = jnp.broadcast_to(now.info.index, now.k.shape[:3])
        return jax.vmap(jnp.vectorize(draw), in_axes=(None, 0))(heads, index)

    @classmethod
    def examples(cls):
        return (cls(),)
