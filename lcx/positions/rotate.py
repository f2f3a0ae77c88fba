"""The one rotation: float32, with angles that stay right at positions of millions.

`pallas_kernels.angles` has the arithmetic. Measured: under 1e-5 turns at 4,000,000 and at 2**24; positions with a fraction,
whose products are rounded, under 1e-4. A learned frequency is split likewise, exactly, in float32.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.parallel.rules import ambient_mesh
from lcx.positions.frequencies import Frequencies
from pallas_kernels import angles


def turns(
    positions: Float[Array, "B T P"], frequencies: Frequencies, lengths: Int[Array, "B T"] | None = None
) -> Float[Array, "B T C"]:
    """Angle of each pair in turns, in [-0.5, 0.5]; positions up to 2**24 in magnitude, fractions allowed."""
    chosen = _chosen(positions, frequencies, lengths)
    first, second, third = angles.parts(frequencies.inv_freq / (2 * np.pi))
    driven = _driving(positions.astype(jnp.float32), frequencies)
    return angles.turns(driven, chosen(first), chosen(second), chosen(third))


def tables(
    positions: Float[Array, "B T P"], frequencies: Frequencies, lengths: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
    """(cosine, sine) of each pair's angle, times the factor.

    XLA's CPU backend fuses them into every user, so that each head would compute the angle anew (an eighth of a training
    step), and drops optimization barriers; it does not fuse out of a conditional. At positions all zero nothing turns.
    """

    factor = frequencies.factor
    if frequencies.by_length:
        rows = np.broadcast_to(np.asarray(factor), len(frequencies.inv_freq))[:, None]
        factor = _chosen(positions, frequencies, lengths)(rows)

    def turned(positions):
        angle = (2 * jnp.pi) * turns(positions, frequencies, lengths)
        return jnp.cos(angle) * factor, jnp.sin(angle) * factor

    def still(positions):
        zero = jnp.broadcast_to(0 * positions[..., :1], (*positions.shape[:-1], frequencies.inv_freq.shape[-1]))
        return zero + factor, zero

    if ambient_mesh() is not None:
        return turned(positions)
    once = lambda positions: jax.lax.cond(jnp.any(positions != 0), turned, still, positions)
    return jax.lax.platform_dependent(positions.astype(jnp.float32), cpu=once, default=turned)


def rotate(
    x: Float[Array, "B T H D"],
    positions: Float[Array, "B T P"],
    frequencies: Frequencies,
    lengths: Int[Array, "B T"] | None = None,
    side: Literal["query", "key"] = "query",
) -> Float[Array, "B T H D"]:
    """Rotates the first 2C channels of each head by its position; the result is float32.

    side: which of the two are rotated, where they differ (`growth`). lengths: of the tokens' documents. Raises ValueError
    without them if the frequencies depend on them.
    """
    cosine, sine = (table[:, :, None] for table in tables_of(side, positions, frequencies, lengths))
    return turned_by(x.astype(jnp.float32), cosine, sine, frequencies)


def tables_of(
    side: Literal["query", "key"],
    positions: Float[Array, "B T P"],
    frequencies: Frequencies,
    lengths: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B T C"]]:
    """`tables` of what is rotated, which differ where the rope grows."""
    cosine, sine = tables(positions, frequencies, lengths)
    if frequencies.growth is None:
        return cosine, sine
    sign = 1 if side == "query" else -1
    grown = jnp.exp(sign * frequencies.growth.astype(np.float32) * _driving(positions.astype(jnp.float32), frequencies))
    return cosine * grown, sine * grown


def turned_by(
    x: Float[Array, "B T H D"], cosine: Float[Array, "..."], sine: Float[Array, "..."], frequencies: Frequencies
) -> Float[Array, "B T H D"]:
    """`rotate` by given tables [B or 1, T or 1, 1, C], which means of several are too."""
    pairs = frequencies.inv_freq.shape[-1]
    if frequencies.pairing == "half":
        first, second = x[..., :pairs], x[..., pairs : 2 * pairs]
    else:
        first, second = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    turned = first * cosine - second * sine, first * sine + second * cosine
    if frequencies.pairing == "half":
        rotated = jnp.concatenate(turned, axis=-1)
    else:
        rotated = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * pairs)
    return jnp.concatenate([rotated, x[..., 2 * pairs :]], axis=-1)


def _driving(positions: Float[Array, "B T P"], frequencies: Frequencies) -> Float[Array, "B T C"]:
    """The position that drives each pair; where tokens have one, as text has, it stands for all axes."""
    axes, given = int(frequencies.axis.max(initial=0)) + 1, positions.shape[-1]
    if given == 1:
        return positions
    if axes != given:
        raise ValueError(f"info.positions: {given} axes, but the rope's sections read {axes}: expected as many, or 1 for text")
    return positions[..., frequencies.axis]


def _chosen(positions: Float[Array, "B T P"], frequencies: Frequencies, lengths):
    """What a token reads of a host array [C], or of one [N, C] with a row for each length, in float32."""
    if not frequencies.by_length:
        return lambda part: part.astype(jnp.float32)
    if lengths is None:
        raise ValueError("info.lengths: None, but this rope depends on the length of a document: expected one for every token")
    row = frequencies.row(lengths)
    if frequencies.kept:
        row = jnp.where(_driving(positions, frequencies)[..., 0] < frequencies.kept, len(frequencies.inv_freq) - 1, row)
    return lambda part: jnp.asarray(part, jnp.float32)[row]
