"""mass: the attention that keys receive. Eviction policies and attention-based retrieval read it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.attention.mask import Mask, tokens_of
from lcx.batch import TokenInfo
from lcx.positions.linear_bias import LinearBias
from pallas_kernels.tile_attention.tokens import Tokens, distance

CHUNK = 512  # keys whose probabilities exist at once


def mass(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    lse: Float[Array, "B T H"],
    q_info: TokenInfo,
    k_info: TokenInfo,
    *,
    mask: Mask,
    scale: float,
    rows: Int[Array, "R"],
    softcap: float | None = None,
    bias: LinearBias | None = None,
) -> Float[Array, "B K S"]:
    """Attention probability that each key receives from the query rows `rows`, summed over them and the heads of its group.

    `lse` is what `attend` returned for the same mask, scale, soft-cap and bias, over all keys. Differentiable; memory grows
    with R x 512, never with T x S. Rows that see nothing give nothing.
    """
    B, _, H, D = q.shape
    S, K = k.shape[1:3]
    q = jnp.take(q, rows, axis=1).astype(jnp.float32).reshape(B, -1, K, H // K, D) * scale
    lse = jnp.take(lse, rows, axis=1).reshape(B, -1, K, H // K)
    q_tokens = Tokens(*(jnp.take(field, rows, axis=1) for field in tokens_of(q_info))).rows()
    if S == 0:
        return jnp.zeros((B, K, 0))
    chunk = min(CHUNK, S)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -S % chunk)) + ((0, 0),) * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(B, -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def received(part):
        k, k_tokens = part
        scores = jnp.einsum("brkgd,bskd->brkgs", q, k.astype(jnp.float32), precision="highest")
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        if bias is not None:
            slopes = jnp.asarray(bias.slopes(H), jnp.float32).reshape(K, H // K, 1)
            scores = scores - slopes * distance(q_tokens, k_tokens.columns(), bias.along)[:, :, None, None]
        seen = mask.visible(q_tokens, k_tokens.columns())[:, :, None, None]
        known = seen & (lse != -jnp.inf)[..., None]
        return jnp.where(known, jnp.exp(jnp.where(known, scores - lse[..., None], 0)), 0).sum(axis=(1, 3))

    parts = cut(k), Tokens(*map(cut, tokens_of(k_info)))
    return jnp.moveaxis(jax.lax.map(received, parts), 0, 2).reshape(B, K, -1)[..., :S]
