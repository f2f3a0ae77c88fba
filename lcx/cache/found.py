"""What queries find in slots of a `KVCache`: by a kernel that reads codes, or in spans that are decoded."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.attention.merge import Part
from lcx.batch import PADDING, TokenInfo
from lcx.cache.codecs.plain import Plain
from lcx.cache.coded import attend_codes
from lcx.cache.layered import rows_from
from lcx.cache.spans import Slots, attend_slots
from lcx.positions.frequencies import Frequencies
from pallas_kernels.tile_attention.op import Fold


def found_in(
    cache: Any,
    fold: Fold,
    q: Float[Array, "B T H _"],
    q_info: TokenInfo,
    coded: tuple[Any, Any, Float[Array, "rows K S"] | None],
    info: TokenInfo,
    tables: tuple[Any, Any],
    frequencies: Frequencies | None,
    first: Int[Array, ""] | int = 0,
) -> Part:
    """What queries find in the slots of a device. fold: the attention of which this is a part. coded: codes of keys, of values,
    and counts. first: the row of slots that is row 0 of the queries."""
    codes_k, codes_v, counts = coded
    segments, counts = rows_from((info.segments, counts), first, len(q))
    places = jnp.where(segments != PADDING, jnp.arange(segments.shape[2]) + 1, 0)
    used = places.max(axis=(1, 2), initial=0)
    weight = lambda counts: jnp.log(counts) if cache.policy is not None and cache.policy.weighs else None
    sides = (coder.format(*x) for coder, *x in zip(cache.coders, (codes_k, codes_v), tables, strict=True))
    turned = frequencies if cache.keys == "raw" else None
    how = {"used": used, "extra": weight(counts), "frequencies": turned, "first": first}
    found = attend_codes(fold, q, q_info, *sides, info, **how)
    if found is not None:
        return found

    def read(part) -> Slots:
        (codes_k, codes_v, counts), info = part
        k, v = (coder.decode(*x) for coder, *x in zip(cache.coders, (codes_k, codes_v), tables, strict=True))
        return Slots(cache.turned_slots(k, info, frequencies), v, info, weight(counts))

    _, K, _, E = jax.eval_shape(lambda: cache.coders[1].decode(rows_from(codes_v, 0, len(q)), tables[1])).shape
    apart = len(info.segments) == len(q)  # of slots of all layers, spans alone are cut out
    whole = cache.codec == Plain() and cache.keys == "rotated" and apart  # nothing to decode
    sizes = {"size": segments.shape[2], "used": used.max(), "block": None if whole else cache.codec.block, "first": first}
    return attend_slots(fold, q, q_info, (coded, info), read, **sizes, kv_heads=K, value_dim=E)
