"""Attention to held slots, decoded a span at a time: of keys in full precision one span exists at once, whatever the length.

Slots are [B, K, S, ...] and their infos are of a key head or of all, so key heads become rows of the attention call. Each span
is one call, merged into what came before; spans behind the last slot in use are not read. No gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.attention.mask import tokens_of
from lcx.attention.merge import Part, merge
from lcx.batch import TokenInfo
from pallas_kernels.tile_attention.op import Fold
from pallas_kernels.tile_attention.tokens import Bias

SPAN = 2048  # slots


class Slots(NamedTuple):
    """Some slots, ready for attention. k: rotated, or raw for a distance plan. extra: added to the logits of each, if any."""

    k: Float[Array, "B K n D"]
    v: Float[Array, "B K n E"]
    info: TokenInfo  # [B, K or 1, n]
    extra: Float[Array, "B K n"] | None = None


def attend_slots(
    fold: Fold,
    q: Float[Array, "B T H _"],
    q_info: TokenInfo,
    held: Any,
    read: Callable[[Any], Slots],
    *,
    size: int,
    used: Int[Array, ""],
    block: int | None,
    kv_heads: int,
    value_dim: int,
    first: Int[Array, ""] | int = 0,
) -> Part:
    """(out [B, T, H, E], lse [B, T, H]) of queries and `size` slots, of which those from `used` on are empty.

    fold: the attention of which this is a part. held: arrays [B, K, n, ...] with n in proportion to the slots, cut only between
    blocks, or not at all if block is None; of more rows, those from `first` on. read: of a span of them.
    """
    B, T, H, _ = q.shape
    group = H // kv_heads
    by_head = lambda x: jnp.moveaxis(x.reshape(B, T, kv_heads, group, *x.shape[3:]), 2, 1).reshape(-1, T, group, *x.shape[3:])
    queries = by_head(q)
    q_tokens = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0), tokens_of(q_info))
    plan = ()
    if (decay := getattr(fold, "decay", None)) is not None:
        bias = decay.bias(q)
        plan = (None, Bias(by_head(bias.slopes), bias.along))

    def part(number, count: int) -> Part:
        of = lambda x, slots: slots * x.shape[2] // size

        def cut(x):
            begin = first if len(x) > B else 0, 0, number * of(x, span), *(0,) * (x.ndim - 3)
            return jax.lax.dynamic_slice(x, begin, (B, x.shape[1], of(x, count), *x.shape[3:]))

        found = read(jax.tree.map(cut, held))
        asked, keys = queries, _as_rows(found.k)
        if found.extra is not None:  # one channel more, where every query has what takes the scale back
            asked = jnp.concatenate([asked, jnp.full_like(asked[..., :1], 1 / fold.scale)], axis=-1)
            keys = jnp.concatenate([keys, _as_rows(found.extra[..., None])], axis=-1)
        each = lambda x: jnp.broadcast_to(x, (B, kv_heads, count)).reshape(-1, count)
        tokens = jax.tree.map(each, tokens_of(found.info))
        return fold.forward(asked, keys.astype(q.dtype), _as_rows(found.v).astype(q.dtype), q_tokens, tokens, *plan)

    span = size if block is None else max(SPAN // block, 1) * block
    whole, rest = divmod(size, span)
    if size <= span:
        out, lse = part(0, size)
    else:
        nothing = jnp.zeros((B * kv_heads, T, group, value_dim)), jnp.full((B * kv_heads, T, group), -jnp.inf)
        turns = jnp.minimum(-(-used // span), whole)
        out, lse = jax.lax.fori_loop(0, turns, lambda n, found: merge(found, part(n, span)), nothing)
        if rest:
            out, lse = merge((out, lse), part(whole, rest))
    back = lambda x: jnp.moveaxis(x.reshape(B, kv_heads, T, group, *x.shape[3:]), 1, 2).reshape(B, T, H, *x.shape[3:])
    return back(out), back(lse)


def _as_rows(x: Float[Array, "B K n D"]) -> Float[Array, "BK n 1 D"]:
    return x.reshape(-1, x.shape[2], 1, x.shape[3])
