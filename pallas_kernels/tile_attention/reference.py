"""Attention with a dense mask in float32: the only numerical authority. Memory grows with T x S.

    s[h,i,j] = softcap(scale * q[i,h] . k[j, h // (H/K)]) - slope[i,h] |x_i - x_j|
    p = softmax over visible j,   out = p v,   lse = log sum exp s
with x the field of the tokens that a bias is along.
A row that sees nothing gives out = 0 and lse = -inf, with zero gradients.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.tile_attention.tokens import Bias, Mask, Tokens, distance


def forward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
    allowed: Bool[Array, "B groups T S"] | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse), both in the precision of at least float32 (float64 if the inputs are). Differentiable.

    allowed: the only pairs that may be seen, on top of the mask; one set for all heads, a key head or a query head.
    """
    q, k, v, visible = _prepared(q, k, v, q_tokens, k_tokens, mask, allowed)
    scores = _scores(q, k, scale, softcap) + _biases(bias, q_tokens, k_tokens, q.shape)
    sees = visible.any(axis=-1, keepdims=True)
    scores = jnp.where(visible, scores, -jnp.inf)
    # The largest score cancels out; its gradient would divide by how many scores equal it, none if one is rounded anew.
    peak = jax.lax.stop_gradient(jnp.where(sees, jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf), 0))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - peak, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(sees, total, 1)
    out = jnp.einsum("bkgts,bske->btkge", weights / safe, v, precision="highest")
    lse = jnp.where(sees, peak + jnp.log(safe), -jnp.inf)[..., 0]
    B, T, K, G, _ = q.shape
    return out.reshape(B, T, K * G, -1), lse.transpose(0, 3, 1, 2).reshape(B, T, K * G)


def backward(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    lse: Float[Array, "B T H"],
    delta: Float[Array, "B T H"],
    d_out: Float[Array, "B T H E"],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    bias: Bias | None = None,
    allowed: Bool[Array, "B groups T S"] | None = None,
) -> tuple[Float[Array, "B T H D"], Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Returns (dq, dk, dv). lse and delta are those of the whole softmax, of which these keys may be a part."""
    shape = q.shape
    q, k, v, visible = _prepared(q, k, v, q_tokens, k_tokens, mask, allowed)
    B, T, K, G, _ = q.shape
    lse, delta = (x.reshape(B, T, K, G).transpose(0, 2, 3, 1)[..., None] for x in (lse, delta))
    d_out = d_out.astype(q.dtype).reshape(B, T, K, G, -1)
    scores, biases = _scores(q, k, scale, softcap), _biases(bias, q_tokens, k_tokens, q.shape)
    visible = visible & (lse != -jnp.inf)
    p = jnp.where(visible, jnp.exp(jnp.where(visible, scores + biases - lse, 0)), 0)
    dp = jnp.einsum("btkge,bske->bkgts", d_out, v, precision="highest")
    ds = p * (dp - delta) * scale * (1 if softcap is None else 1 - jnp.square(scores / softcap))
    dq = jnp.einsum("bkgts,bskd->btkgd", ds, k, precision="highest").reshape(shape)
    dk = jnp.einsum("bkgts,btkgd->bskd", ds, q, precision="highest")
    return dq, dk, jnp.einsum("bkgts,btkge->bske", p, d_out, precision="highest")


def _prepared(q, k, v, q_tokens, k_tokens, mask, allowed):
    """q by key head, all in at least float32, and the visible pairs [B, K or 1, H/K or 1, T, S]."""
    (B, T, H, D), K = q.shape, k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    visible = mask.visible(q_tokens.rows(), k_tokens.columns())[:, None, None]
    if allowed is not None:
        groups = min(allowed.shape[1], K)
        visible = visible & allowed.reshape(B, groups, allowed.shape[1] // groups, T, k.shape[1])
    return q.astype(dtype).reshape(B, T, K, H // K, D), k.astype(dtype), v.astype(dtype), visible


def _scores(q, k, scale, softcap):
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, precision="highest") * scale
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def _biases(bias, q_tokens, k_tokens, shape):
    if bias is None:
        return 0
    away = distance(q_tokens.rows(), k_tokens.columns(), bias.along)[:, None, None]
    return -bias.slopes.reshape(shape[:4]).transpose(0, 2, 3, 1)[..., None] * away
