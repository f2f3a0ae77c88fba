"""How the next token is chosen from logits: greedy, or sampled with temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling(Spec):
    """temperature 0 is greedy. top_k keeps the k likeliest tokens, then top_p the fewest of them whose mass reaches p.

    Of equally likely tokens the lowest ids come first, everywhere.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def validate(self):
        self.check(self.temperature >= 0, "temperature", "0 or a positive number")
        self.check(self.top_k is None or self.top_k >= 1, "top_k", "at least 1 or None")
        self.check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "a share in (0, 1] or None")
        greedy = self.temperature == 0
        self.check(
            not greedy or (self.top_k is None and self.top_p is None), "temperature", "positive where top_k or top_p is set"
        )

    def choose(self, logits: Float[Array, "B V"], keys: Key[Array, "B"]) -> Int[Array, "B"]:
        """One token a row; `keys [B]`, so that a row's draw does not depend on its neighbours."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / self.temperature
        if self.top_k is not None:
            logits = _likeliest(logits, min(self.top_k, logits.shape[-1]))
        if self.top_p is not None:
            logits = _nucleus(logits, self.top_p)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _likeliest(logits: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    row = jnp.arange(len(logits))[:, None]
    kept = jnp.zeros(logits.shape, bool).at[row, jax.lax.top_k(logits, k)[1]].set(True)
    return jnp.where(kept, logits, -jnp.inf)


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Drops tokens once the mass of the likelier ones has reached `top_p`; the likeliest always stays."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.take_along_axis(before < top_p, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)
