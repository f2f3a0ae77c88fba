"""Persistent memory: learned keys and values that every query sees (Sukhbaatar et al. 2019; Titans, 2024)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcx.attention.merge import merge


def with_persistent(
    out: Float[Array, "B T H E"],
    lse: Float[Array, "B T H"],
    q: Float[Array, "B T H D"],
    real: Bool[Array, "B T"],
    keys: Float[Array, "K N D"],
    values: Float[Array, "K N E"],
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`merge` with a part that all real tokens see: queries as they are before any rotation, keys that none turns, so without a
    rope's factor. Padding gives 0, and no gradient.
    """
    group = q.shape[2] // keys.shape[0]
    each = lambda x: jnp.repeat(x.astype(jnp.float32), group, axis=0)
    scores = jnp.einsum("bthd,hnd->bthn", q.astype(jnp.float32), each(keys), precision="highest") * scale
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    seen = real[..., None]
    found = jnp.einsum("bthn,hne->bthe", jax.nn.softmax(scores), each(values), precision="highest")
    both = merge((out, lse), (found, jax.nn.logsumexp(scores, axis=-1)))
    return jnp.where(seen[..., None], both[0], out), jnp.where(seen, both[1], lse)
