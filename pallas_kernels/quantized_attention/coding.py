"""How keys and values become codes: each token by itself, or some tokens of a channel together; in one pass on TPUs.

A coding says how in terms of an axis, so that the same lines code tokens whose channels lie last and tiles of a kernel whose
tokens do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels.quantized_attention import coding_tpu
from pallas_kernels.quantized_attention.packing import pack
from pallas_kernels.target import on_one_device, platform


@dataclasses.dataclass(frozen=True)
class Coding:
    """code(x, by_channel, by_head, axis): codes of numbers in float32, like x and in float32 too, and what is shared along
    `axis`, one number along it each. by_channel: arrays that are broadcast over tokens, by_head: over these and channels.

    dtype: of codes. bits: of codes that are packed, None of those that stay as they are. tokens: of a channel that are coded
    together, along `axis`; None is each token by itself, its channels along it.
    """

    code: Callable[[Any, tuple, tuple, int], tuple[Any, list]]
    dtype: Any
    bits: int | None = None
    tokens: int | None = None


def coded(
    coding: Coding,
    x: Float[Array, "B K T D"],
    by_channel: tuple[Float[Array, "B K D"], ...] = (),
    by_head: tuple[Float[Array, "B K"], ...] = (),
) -> tuple[Any, tuple[Shaped[Array, "..."], ...]]:
    """(codes, planes of words if they are packed; what is shared): of each token [B, K, T], or of some tokens [B, K, n, D]. No
    gradient."""
    if platform() == "tpu" and on_one_device() and coding_tpu.taken(coding, x):
        return coding_tpu.coded(coding, x, by_channel, by_head)
    codes, shared = plainly(coding, x, by_channel, by_head)
    return codes if coding.bits is None else pack(codes, coding.bits), shared


def plainly(coding: Coding, x, by_channel: tuple = (), by_head: tuple = ()) -> tuple[Any, tuple]:
    """As XLA has it; codes not packed."""
    *lead, T, D = x.shape
    x, axis = x.astype(jnp.float32), -1
    if coding.tokens is not None:
        x, axis = x.reshape(*lead, T // coding.tokens, coding.tokens, D), -2
    wide = tuple(c[..., None, :] for c in by_channel), tuple(h[..., None, None] for h in by_head)
    codes, shared = coding.code(x, *wide, axis)
    return coding_tpu.cast(codes, coding.dtype).reshape(*lead, T, D), tuple(s.squeeze(axis) for s in shared)


def channel(x: Shaped[Array, "..."], axis: int) -> Int[Array, "..."]:
    """The number of each channel."""
    return jax.lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim)
