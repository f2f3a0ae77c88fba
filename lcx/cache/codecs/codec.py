"""The contract of a codec: how the keys and the values of a cache are held.

A codec names two quantizers. A quantizer turns tokens [B, K, N, D] into codes, a pytree whose leaves are [B, K, n, ...] with n
in proportion to N, and back. `block` tokens are coded together; those that do not fill a block wait in full precision. Between
tokens and codes are loose codes, [B, K, N, ...] each, of which a cache may take any tokens out: what one block shares is
dissolved, what a token has of its own stays as it is. How tokens are coded is said once, as a `Coding`, of which come both
loose codes and those that a kernel makes in one pass (`pallas_kernels.quantized_attention.coding`).
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcx.spec import Spec
from pallas_kernels.quantized_attention.formats import Arrays, Format


class Quantizer(abc.ABC):
    """Of keys or of values. tables: what `Codec.tables` gives of its side, for its layer, arrays [B, K, ...]."""

    block: int = 1
    exact: bool = False  # whether loose codes are the tokens themselves

    @abc.abstractmethod
    def loose(self, x: Float[Array, "B K N D"], tables: Any) -> Any:
        """Loose codes of tokens."""

    @abc.abstractmethod
    def value(self, loose: Any, tables: Any) -> Float[Array, "B K N D"]:
        """What loose codes stand for."""

    def tightened(self, loose: Any, tables: Any) -> Any:
        """Codes of loose codes, N a multiple of `block`."""
        return loose

    def loosened(self, codes: Any, tables: Any) -> Any:
        """Loose codes of codes: the inverse of `tightened`, exact where a token's code is its own."""
        return codes

    def format(self, codes: Any, tables: Any) -> tuple[Format, Arrays] | None:
        """Codes as the kernels that read them know them; None if none does."""
        return None

    def encode(self, x: Float[Array, "B K N D"], tables: Any = None) -> Any:
        """Codes of tokens, N a multiple of `block`."""
        return self.tightened(self.loose(x, tables), tables)

    def decode(self, codes: Any, tables: Any = None) -> Float[Array, "B K N D"]:
        """What codes stand for."""
        return self.value(self.loosened(codes, tables), tables)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codec(Spec, abc.ABC):
    """Base of every codec. raw: codes keys before they are rotated, whatever the rope; needs a cache of raw keys."""

    @property
    @abc.abstractmethod
    def keys(self) -> Quantizer: ...

    @property
    @abc.abstractmethod
    def values(self) -> Quantizer: ...

    @property
    def recent(self) -> int:
        """The newest tokens that are held in full precision, at least."""
        return 0

    @property
    def raw(self) -> bool:
        """Whether it is for keys that are not rotated yet."""
        return False

    @property
    def first(self) -> int:
        """The first tokens of a row that are held in full precision."""
        return 0

    def tables(self, layer: int, kv_heads: int, head_dim: int, value_dim: int) -> tuple[Any, Any]:
        """What the quantizers of keys and values know beforehand of a layer, arrays [K, ...]."""
        return None, None

    @property
    def by_layer(self) -> bool:
        """Whether layers have tables of their own."""
        return False

    @property
    def block(self) -> int:
        """Tokens that leave full precision together."""
        return max(self.keys.block, self.values.block)


def bits_of(codes: Any, numbers: int) -> float:
    """Bits that codes take for each of so many numbers, measured."""
    return 8 * sum(leaf.size * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(codes)) / numbers
