"""Attention to coded slots in float32, everything decoded: the only numerical authority. Memory grows with T x S.

    s[h,t,j] = softcap(scale q[t,h] . k[j]) - slope[t,h] |x_t - x_j| + extra[j]
    p = softmax over visible j,   out = p v,   lse = log sum exp s
A row that sees nothing gives out = 0 and lse = -inf.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels.quantized_attention.formats import (
    Arrays,
    ChannelGroups,
    Codebook,
    CodebookArrays,
    Format,
    Numbers,
    Pairing,
    Plan,
    Scaled,
    Slots,
    channels,
    places,
)
from pallas_kernels.quantized_attention.half import halves
from pallas_kernels.quantized_attention.packing import unpack
from pallas_kernels.tile_attention.tokens import Tokens, distance


def forward(
    plan: Plan,
    q: Float[Array, "B T H D"],
    slots: Slots,
    q_tokens: Tokens,
    slopes: Float[Array, "B T H"] | None = None,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """Returns (out, lse) in float32."""
    slots = slots.own
    k, v = decoded(plan.keys, slots.k), decoded(plan.values, slots.v)
    B, K, S, D = k.shape
    T, H = q.shape[1:3]
    if slots.pairs:
        tables = (slots.cosine, slots.sine) if slots.turning is None else slots.turning.tables()
        k = rotated(k, *(x.reshape(B, -1, S, x.shape[-1]).astype(jnp.float32) for x in tables), plan.pairing)
    there = (slots.tokens.segments != 0) & (jnp.arange(S) < slots.used[:, None, None])
    k, v = (jnp.where(there[..., None], x, 0) for x in (k, v))
    rows = Tokens(*(x[:, None, :, None] for x in q_tokens))
    visible = (plan.mask.visible(rows, slots.tokens.columns()) & there[:, :, None])[:, :, None]
    q = q.astype(jnp.float32).reshape(B, T, K, H // K, D)
    s = jnp.einsum("btkgd,bksd->bkgts", q, k, precision="highest") * plan.scale
    if plan.softcap is not None:
        s = plan.softcap * jnp.tanh(s / plan.softcap)
    if slopes is not None:
        slopes = slopes.reshape(B, T, K, H // K).transpose(0, 2, 3, 1)[..., None]
        s = s - slopes * distance(rows, slots.tokens.columns(), plan.along)[:, :, None].astype(jnp.float32)
    if slots.extra is not None:
        s = s + slots.extra[:, :, None, None]
    sees = visible.any(axis=-1, keepdims=True)
    s = jnp.where(visible, s, -jnp.inf)
    peak = jnp.where(sees, s.max(axis=-1, keepdims=True), 0)
    p = jnp.exp(s - peak)
    total = jnp.where(sees, p.sum(axis=-1, keepdims=True), 1)
    out = jnp.einsum("bkgts,bkse->btkge", p / total, v, precision="highest")
    lse = jnp.where(sees, peak + jnp.log(total), -jnp.inf)[..., 0]
    return out.reshape(B, T, H, -1), lse.transpose(0, 3, 1, 2).reshape(B, T, H)


def decoded(form: Format, arrays: Arrays) -> Float[Array, "B K S D"]:
    """What the codes of all slots stand for."""
    if isinstance(form, Numbers):
        return arrays.codes.astype(jnp.float32)
    if isinstance(form, Scaled):
        return arrays.codes.astype(jnp.float32) * arrays.scale[..., None]
    codes = unpack(arrays.codes, form.bits)
    if isinstance(form, Codebook):
        return _looked_up(codes, arrays)
    of_channels = isinstance(form, ChannelGroups)
    scale, zero = (halves(jnp.stack(x, axis=-1) if of_channels else x) for x in (arrays.scale, arrays.zero))
    scale, zero = (jnp.repeat(x, form.size, axis=-1 if of_channels else -2) for x in (scale, zero))
    return codes.astype(jnp.float32) * scale + zero


def _looked_up(codes: UInt8[Array, "B K S D"], arrays: CodebookArrays) -> Float[Array, "B K S D"]:
    found = jnp.take_along_axis(arrays.codebook, codes.reshape(*codes.shape[:2], -1).astype(jnp.int32), axis=-1).reshape(
        codes.shape
    )
    if arrays.by_channel is not None:
        zero, half = arrays.by_channel[:, :, :1], arrays.by_channel[:, :, 1:]
    else:
        zero, half = (halves(x)[..., None] for x in arrays.by_token)
    x, channel = found * half + zero, jnp.arange(channels(arrays))
    for place, number in zip(places(arrays.place, channels(arrays), len(arrays.number)), arrays.number, strict=True):
        x = jnp.where(channel == place[..., None], halves(number)[..., None], x)
    return x


def rotated(
    k: Float[Array, "B K S D"], cosine: Float[Array, "B _ S C"], sine: Float[Array, "B _ S C"], pairing: Pairing
) -> Float[Array, "B K S D"]:
    """The first 2C channels turned, those of a pair C apart or side by side."""
    C = cosine.shape[-1]
    turned, rest = k[..., : 2 * C], k[..., 2 * C :]
    if pairing == "half":
        first, second = turned[..., :C], turned[..., C:]
    else:
        first, second = turned[..., ::2], turned[..., 1::2]
    pair = first * cosine - second * sine, first * sine + second * cosine
    turned = jnp.concatenate(pair, axis=-1) if pairing == "half" else jnp.stack(pair, axis=-1).reshape(turned.shape)
    return jnp.concatenate([turned, rest], axis=-1)


def partners(q: Float[Array, "*n D"], pairs: int, pairing: Pairing) -> Float[Array, "*n D"]:
    """q' such that q . rotated(k) = sum over channels of k (q cosine + q' sine), those of a channel's pair."""
    turned, rest = q[..., : 2 * pairs], q[..., 2 * pairs :]
    if pairing == "half":
        turned = jnp.concatenate([turned[..., pairs:], -turned[..., :pairs]], axis=-1)
    else:
        turned = jnp.stack([turned[..., 1::2], -turned[..., ::2]], axis=-1).reshape(turned.shape)
    return jnp.concatenate([turned, jnp.zeros_like(rest)], axis=-1)
