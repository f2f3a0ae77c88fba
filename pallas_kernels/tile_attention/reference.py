"""Attention with a dense mask in float32: the only numerical authority. Memory grows with T x S.

    s[h,i,j] = softcap(scale * q[i,h] . k[j, h // (H/K)]),   p = softmax over visible j,   out = p v,   lse = log sum exp s
A row that sees nothing gives out = 0 and lse = -inf, with zero gradients.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_attention.tokens import Mask, Tokens


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse), both in the precision of at least float32 (float64 if the inputs are)."""
    B, T, H, D = q.shape
    K = k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = q.astype(dtype).reshape(B, T, K, H // K, D), k.astype(dtype), v.astype(dtype)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, precision="highest") * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible = mask.visible(q_tokens.rows(), k_tokens.columns())[:, None, None]
    sees = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = jnp.where(sees, jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf), 0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores, 0) - peak), 0)
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(sees, total, 1)
    out = jnp.einsum("bkgts,bske->btkge", weights / safe, v, precision="highest")
    lse = jnp.where(sees, peak + jnp.log(safe), -jnp.inf)[..., 0]
    return out.reshape(B, T, H, -1), lse.transpose(0, 3, 1, 2).reshape(B, T, H)
