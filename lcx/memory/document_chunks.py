"""Chunks that begin with documents, whatever is packed or padded around these.

A memory that takes gradients, or reads, at the start of a chunk has to count chunks from the first token of a document, or what
it answers would depend on what the document is packed with. The tokens of a row [B,T] are laid into `n` chunks of `size` slots;
the last chunk of each document stays partly empty. So a row of D documents fills at most `(T - D) // size + D` chunks, and `D`
is what a model says (`Decoder.documents`); a token for which there is no chunk left gives NaN.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from lcx.batch import PADDING, TokenInfo


class DocumentChunks(NamedTuple):
    """source: the token [0, T) of each slot, T where it is empty. slot: of each token, n * size where it has none. lost: tokens
    for which there is no chunk. begins: chunks with a document's first token. count: tokens of each chunk."""

    source: Int[Array, "B slots"]
    slot: Int[Array, "B T"]
    lost: Bool[Array, "B T"]
    begins: Bool[Array, "B n"]
    count: Int[Array, "B n"]

    @property
    def live(self) -> Bool[Array, "n"]:
        """Chunks that have tokens in some row."""
        return (self.count > 0).any(axis=0)

    def gather(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B slots ..."]:
        """The tokens in their slots, 0 in empty ones."""
        wide = jnp.pad(x, ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
        return jnp.take_along_axis(wide, self.source.reshape(*self.source.shape, *[1] * (x.ndim - 2)), axis=1)

    def scatter(self, y: Float[Array, "B slots ..."]) -> Float[Array, "B T ..."]:
        """What stands in the slots at their tokens; 0 for padding, NaN for lost tokens."""
        wide = jnp.pad(y, ((0, 0), (0, 1)) + ((0, 0),) * (y.ndim - 2))
        of_token = lambda x: x.reshape(*x.shape, *[1] * (y.ndim - 2))
        return jnp.where(of_token(self.lost), jnp.nan, jnp.take_along_axis(wide, of_token(self.slot), axis=1))

    def cut(self, x: Shaped[Array, "B T ..."]) -> Shaped[Array, "n B size ..."]:
        """`gather`, chunk after chunk."""
        laid, (rows, n) = self.gather(x), self.count.shape
        return jnp.moveaxis(laid.reshape(rows, n, -1, *laid.shape[2:]), 1, 0)

    def join(self, y: Float[Array, "n B size ..."]) -> Float[Array, "B T ..."]:
        """`scatter` of chunk after chunk."""
        return self.scatter(jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, *y.shape[3:]))


def chunk_count(length: int, size: int, documents: int) -> int:
    """Chunks that rows of `length` tokens of at most so many documents fill."""
    documents = min(documents, length)
    return (length - documents) // size + documents


def document_chunks(
    info: TokenInfo, size: int, documents: int, opened: Int[Array, "B"] | None = None, shortest: int | None = None
) -> DocumentChunks:
    """The chunks of rows. Tokens of a document stand in their order, from its first one on. shortest: tokens of a chunk where
    not all are full and the index, which counts slots, skips the empty ones; by default `size`.

    opened: tokens of an open chunk that rows go on with. It is then the first chunk, even where it has and gets none, and its
    `count` has them; tokens at the row's start that begin no chunk belong to it.
    """
    index, real = info.index, info.segments != PADDING
    rows, length = index.shape
    count = chunk_count(length, shortest or size, documents) + (opened is not None)
    begins = real & (index % size == 0)
    if opened is None:
        begins |= real & (jnp.cumsum(real, axis=1) == 1)
    chunk = jnp.cumsum(begins, axis=1) - (opened is None)
    lost = real & (chunk >= count)
    slot = jnp.where(real & ~lost, chunk * size + index % size, count * size)
    row = jnp.arange(rows)[:, None]
    source = jnp.full((rows, count * size), length).at[row, slot].set(jnp.arange(length)[None], mode="drop")
    chunk = jnp.where(real & ~lost, chunk, count)
    filled = jnp.zeros((rows, count), jnp.int32).at[row, chunk].add(1, mode="drop")
    first = jnp.zeros((rows, count), bool).at[row, chunk].max(real & (index == 0), mode="drop")
    if opened is not None:
        filled = filled.at[:, 0].add(opened)
    return DocumentChunks(source, slot, lost, first, filled)
