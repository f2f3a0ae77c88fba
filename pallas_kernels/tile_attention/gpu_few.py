"""Few queries over many keys, as in decoding: the query heads of a key head are rows of one tile, keys are split (split-K).

Flash-Decoding (2023). One tile of rows a key head and a row of the batch would leave most of a GPU idle; parts of the keys are
rows of a larger batch instead, and their results are merged by their lse.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.tile_attention.tokens import Bias, Tokens, pad_tokens

ROWS = 128  # at most, of queries and their heads
TILE = 128  # keys; a part is a multiple of it, the last ones padded
PROGRAMS = 264  # two for each multiprocessor of a Hopper GPU


def serves(q: Float[Array, "B T H D"], k: Float[Array, "B S K D"]) -> bool:
    """Whether the call has few enough queries, and any keys."""
    return 0 < q.shape[1] * (q.shape[2] // k.shape[2]) <= ROWS and k.shape[1] > 0


def forward(
    run: Callable[..., tuple[Array, Array]],
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    bias: Bias | None = None,
    **options: Any,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`run` of the same arguments, a form's forward pass."""
    (B, T, H, _), (_, S, K, _) = q.shape, k.shape
    parts = min(-(-S // TILE), -(-PROGRAMS // (B * K)))
    repeat = lambda x: jnp.repeat(x, parts, axis=0)
    stacked = lambda x: x.reshape(B, T, K, H // K, *x.shape[3:]).swapaxes(2, 3).reshape(B, -1, K, *x.shape[3:])
    if bias is not None:
        options["bias"] = bias._replace(slopes=repeat(stacked(bias.slopes)))
    row_tokens = Tokens(*(repeat(jnp.repeat(field, H // K, axis=1)) for field in q_tokens))
    cut = lambda x: jnp.pad(x, [(0, 0), (0, -S % (parts * TILE)), (0, 0), (0, 0)]).reshape(B * parts, -1, *x.shape[2:])
    key_tokens = Tokens(*(field.reshape(B * parts, -1) for field in pad_tokens(k_tokens, parts * TILE)))
    out, lse = run(repeat(stacked(q)), cut(k), cut(v), row_tokens, key_tokens, **options)
    out, lse = _merged(out.reshape(B, parts, *out.shape[1:]), lse.reshape(B, parts, *lse.shape[1:]))
    heads_last = lambda x: x.reshape(B, T, H // K, K, *x.shape[3:]).swapaxes(2, 3).reshape(B, T, H, *x.shape[3:])
    return heads_last(out), heads_last(lse)


def _merged(out: Float[Array, "B parts *rows E"], lse: Float[Array, "B parts *rows"]) -> tuple[Array, Array]:
    top = lse.max(axis=1, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0, top))
    total = weights.sum(axis=1)
    out = (out * weights[..., None]).sum(axis=1) / jnp.where(total == 0, 1, total)[..., None]
    return out, top[:, 0] + jnp.log(total)
