"""Whether the tokens of a document stand beside each other, which parts that read array neighbours need."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lcx.batch import PADDING, TokenInfo

BROKEN = -2  # the index of a newest token that could not be answered: nothing follows it


def torn(info: TokenInfo, *, within: bool = True) -> Bool[Array, "B T"]:
    """From the first token of a row that goes on with a document, but not right behind that document's last token, to the
    row's end. within: whether a row may begin within a document."""
    index, segments = info.index, info.segments
    before = lambda field: jnp.pad(field, ((0, 0), (1, 0)))[:, :-1]
    real = segments != PADDING
    follows = (before(segments) == segments) & (before(index) == index - 1)
    broken = real & (index > 0) & ~follows
    if within:
        broken &= before(jax.lax.cummax(real.astype(jnp.int32), axis=1)) > 0
    return jax.lax.cummax(broken.astype(jnp.int32), axis=1) > 0


def resumed(
    info: TokenInfo,
    index: Int[Array, "B"],
    segments: Int[Array, "B"],
    *,
    within: bool = True,
    lost: Bool[Array, "B T"] | None = None,
) -> tuple[Bool[Array, "B T"], Int[Array, "B"], Int[Array, "B"]]:
    """Of a chunk behind a token of this index and segment (0: none): what `torn` is of a row, padding left out wherever it
    stands; and index and segment of the newest token now, so that all of a document is broken behind what is. lost: tokens that
    cannot be answered for another reason."""
    real = info.segments != PADDING
    wide = lambda first, field: jnp.concatenate([first[:, None], field], axis=1)
    all_index, all_segments = wide(index, info.index), wide(segments, info.segments)
    places = jnp.arange(real.shape[1] + 1)
    newest = jax.lax.cummax(jnp.where(wide(jnp.ones(len(index), bool), real), places, 0), axis=1)
    before = lambda field: jnp.take_along_axis(field, newest[:, :-1], axis=1)
    follows = (before(all_segments) == info.segments) & (before(all_index) == info.index - 1)
    broken = real & (info.index > 0) & ~follows
    if within:
        broken &= before(all_segments) != PADDING
    if lost is not None:
        broken |= lost
    broken = jax.lax.cummax(broken.astype(jnp.int32), axis=1) > 0
    last = lambda field: jnp.take_along_axis(field, newest[:, -1:], axis=1)[:, 0]
    return broken, jnp.where(broken.any(axis=1), BROKEN, last(all_index)), last(all_segments)
