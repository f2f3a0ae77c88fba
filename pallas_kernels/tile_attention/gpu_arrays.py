"""Arrays of the GPU kernels, which go by names that say their layout, padded to whole tiles.

q, d_out, out, dq [B, T, H, width]   k, v, dk, dv [B, S, K, width]   lse, delta, slopes [B, H, T]   q_tokens [B, 4, T], k_tokens
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.tile_attention.blocks import Sizes
from pallas_kernels.tile_attention.tokens import Bias, Tokens, pad_tokens

KINDS = {
    "query": ("q", "d_out", "out", "dq"),
    "row": ("lse", "delta", "slopes"),
    "q_tokens": ("q_tokens",),
    "key": ("k", "v", "dk", "dv"),
    "k_tokens": ("k_tokens",),
}
KIND = {name: kind for kind, names in KINDS.items() for name in names}


def padded(size: Sizes, arrays: Mapping[str, Array | Tokens]) -> dict[str, Array]:
    """Zeros appended up to whole tiles and padded head sizes; tokens as one array."""
    tile = lambda name: size.bk if KIND[name] in ("key", "k_tokens") else size.bq
    return {name: _padded(name, x, tile(name), size.D if name in ("q", "k") else size.E) for name, x in arrays.items()}


def slopes_of(bias: Bias | None) -> dict[str, Array]:
    """A bias's slopes among the arrays of a kernel."""
    return {} if bias is None else {"slopes": bias.slopes.swapaxes(1, 2)}


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _padded(name: str, x: Array | Tokens, tile: int, width: int) -> Array:
    if isinstance(x, Tokens):
        return jnp.stack([field.astype(jnp.int32) for field in pad_tokens(x, tile)], axis=1)
    if KIND[name] == "row":
        return jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % tile)])
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile), (0, 0), (0, width - x.shape[3])])
