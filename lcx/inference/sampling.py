"""How the next token is chosen from logits: greedy, or sampled with temperature, top-k, top-p and min-p."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from lcx.record import record
from lcx.spec import Spec

ALL, EVERYTHING = (1 << 31) - 1, 2.0  # a count of tokens and a mass that no row reaches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Spec):
    """temperature 0 is greedy. top_k keeps the k likeliest tokens, then top_p the fewest of them whose mass reaches p, then
    min_p those at least so many times as likely as the likeliest (Nguyen et al. 2024).

    Of equally likely tokens the lowest ids come first, everywhere.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def validate(self):
        self.check(self.temperature >= 0, "temperature", "0 or a positive number")
        self.check(self.top_k is None or self.top_k >= 1, "top_k", "at least 1 or None")
        self.check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "a share in (0, 1] or None")
        self.check(self.top_k is None or self.top_k < ALL, "top_k", "less than 2^31 - 1")
        self.check(self.min_p is None or 0 < self.min_p <= 1, "min_p", "a share in (0, 1] or None")
        cut = (self.top_k, self.top_p, self.min_p) != (None, None, None)
        self.check(self.temperature > 0 or not cut, "temperature", "positive where top_k, top_p or min_p is set")

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
        """One token a row."""
        return sampling_rows([self] * len(logits)).choose(logits, keys)


@record
class SamplingRows:
    """A `Sampling` for each row, as arrays: one compiled loop serves all of them."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
        """One token a row; `keys [B]`, so that a row's draw does not depend on its neighbours."""
        greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        hot = self.temperature > 0

        def drawn():
            kept = self._kept(logits / jnp.where(hot, self.temperature, 1.0)[:, None])
            return jnp.where(hot, jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32), greedy)

        return jax.lax.cond(hot.any(), drawn, lambda: greedy)

    def _kept(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Logits of the tokens that may be drawn; of the others -inf."""
        order = jnp.argsort(-logits, axis=-1)
        falling = jnp.take_along_axis(logits, order, axis=-1)
        among = jnp.arange(logits.shape[-1]) < self.top_k[:, None]
        probabilities = jax.nn.softmax(jnp.where(among, falling, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        near = probabilities >= self.min_p[:, None] * probabilities[:, :1]
        kept = among & (before < self.top_p[:, None]) & near
        return jnp.where(jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1), logits, -jnp.inf)


def sampling_rows(each: Sequence[Sampling]) -> SamplingRows:
    """Of a sampling for each row."""
    made = lambda dtype, values: jnp.asarray(np.asarray(values, dtype))
    return SamplingRows(
        temperature=made(np.float32, [one.temperature for one in each]),
        top_k=made(np.int32, [ALL if one.top_k is None else one.top_k for one in each]),
        top_p=made(np.float32, [EVERYTHING if one.top_p is None else one.top_p for one in each]),
        min_p=made(np.float32, [0.0 if one.min_p is None else one.min_p for one in each]),
    )
