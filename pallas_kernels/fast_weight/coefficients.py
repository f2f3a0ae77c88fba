"""What the weights at each token of a chunk are made of: `W_i = keep_i W_0 + carry_i S_0 - sum_j gain_ij x_j^T e_j`.

With D_ij = prod_{j<r<=i} (1 - alpha_r) and H_ij = prod_{j<r<=i} eta_r, both 0 above the diagonal:
    keep_i = prod_{r<=i} (1 - alpha_r),  gain_ij = sum_r D_ir H_rj theta_j,  carry_i = sum_r D_ir prod_{s<=r} eta_s
A token that is not real changes neither W nor S: it decays nothing, and its S is not added.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.fast_weight.network import product
from pallas_kernels.tpu_chips import LANES

LEAST = -60.0  # of the logarithm of a factor: nothing is left

Gradient = Literal["start", "previous", "decayed"]


class Rows(NamedTuple):
    """Of each token's weights: how much of W_0, of S_0, and of the step of every token."""

    keep: Float[Array, "*b i"]
    carry: Float[Array, "*b i"]
    gain: Float[Array, "*b i j"]


class Coefficients(NamedTuple):
    """read: of the weights that each token reads. state, momentum: of W and S behind the chunk, in one row. gradient: of the
    weights at which each token's gradient is taken; None is those at the start."""

    read: Rows
    state: Rows
    momentum: Rows
    gradient: Rows | None


class Packed(NamedTuple):
    """Coefficients in two or three arrays, as a kernel copies them. rows: keep, carry and the gains of state and momentum, then
    keep and carry of the gradient's place if it has one, and in the last row four numbers."""

    gain: Float[Array, "*b i j"]
    place: Float[Array, "*b i j"] | None
    rows: Float[Array, "*b r i"]


NUMBERS = 4  # keep and carry of state and of momentum


def packed(made: Coefficients) -> Packed:
    """Of chunks of at least `NUMBERS` tokens."""
    numbers = jnp.concatenate([made.state.keep, made.state.carry, made.momentum.keep, made.momentum.carry], axis=-1)
    numbers = jnp.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, made.read.keep.shape[-1] - NUMBERS)])
    alone = [made.read.keep, made.read.carry] + ([] if made.gradient is None else [made.gradient.keep, made.gradient.carry])
    rows = [*(x[..., None, :] for x in alone), made.state.gain, made.momentum.gain, numbers[..., None, :]]
    return Packed(made.read.gain, made.gradient and made.gradient.gain, jnp.concatenate(rows, axis=-2))


def unpacked(given: Packed) -> Coefficients:
    """Of one chunk."""
    alone = 2 if given.place is None else 4
    each = lambda n: column(given.rows[n : n + 1])
    gains = (given.rows[alone : alone + 1], given.rows[alone + 1 : alone + 2])
    number = lambda n: given.rows[alone + 2, n : n + 1]
    place = None if given.place is None else Rows(each(2), each(3), given.place)
    state, momentum = Rows(number(0), number(1), gains[0]), Rows(number(2), number(3), gains[1])
    return Coefficients(Rows(each(0), each(1), given.gain), state, momentum, place)


@jax.custom_vjp
def column(row: Float[Array, "1 b"]) -> Float[Array, "b"]:
    """A row's numbers, laid down the rows of a register; turned by transposes, as some chips have no other way back."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, 0]


def row(column: Float[Array, "b"]) -> Float[Array, "1 b"]:
    return jnp.broadcast_to(column[:, None], (len(column), LANES)).T[:1]


column.defvjp(lambda x: (column(x), None), lambda _, d: (row(d),))


def decayed(
    step: Float[Array, "*b i"],
    log_keep: Float[Array, "*b i"] | None = None,
    log_momentum: Float[Array, "*b i"] | None = None,
    real: Bool[Array, "*b i"] | None = None,
    *,
    gradient: Gradient = "start",
) -> Coefficients:
    """Of step sizes theta, log(1 - alpha) and log eta of a chunk's tokens; None is no decay, no momentum, all real.

    gradient: where it is taken: at the chunk's start, at the weights before the token (the delta rule), or at these decayed by
    the token's own factor (the gated delta rule).
    """
    real = jnp.ones(step.shape, bool) if real is None else real
    log_keep = jnp.zeros_like(step) if log_keep is None else jnp.where(real, jnp.maximum(log_keep, LEAST), 0.0)
    step = jnp.where(real, step, 0.0)
    decay = jnp.exp(_sums(log_keep))  # D, whose first column lacks the first token's own factor
    keep = decay[..., 0] * jnp.exp(log_keep[..., :1])
    added = decay * real[..., None, :]
    if log_momentum is None:
        gain, carry = added * step[..., None, :], jnp.zeros_like(step)
        last, left = jnp.zeros_like(gain[..., -1:, :]), jnp.zeros_like(keep[..., -1:])
    else:
        log_momentum = jnp.where(real, jnp.maximum(log_momentum, LEAST), 0.0)
        momentum = jnp.exp(_sums(log_momentum))
        through = momentum[..., 0] * jnp.exp(log_momentum[..., :1])
        gain = product(added, momentum) * step[..., None, :]
        carry = product(added, through[..., None])[..., 0]
        last, left = momentum[..., -1:, :] * step[..., None, :], through[..., -1:]
    read = Rows(keep, carry, gain)
    state = Rows(keep[..., -1:], carry[..., -1:], gain[..., -1:, :])
    place = None
    if gradient != "start":
        own = jnp.exp(log_keep) if gradient == "decayed" else jnp.ones_like(log_keep)
        before = lambda x, first: jnp.concatenate([jnp.full_like(x[..., :1], first), x[..., :-1]], axis=-1)
        shifted = jnp.concatenate([jnp.zeros_like(gain[..., :1, :]), gain[..., :-1, :]], axis=-2)
        place = Rows(own * before(keep, 1.0), own * before(carry, 0.0), own[..., None] * shifted)
    none = jnp.zeros_like(left)
    return Coefficients(read, state, Rows(none, left, last), place)


def bounded(made: Coefficients, overlap: Float[Array, "i j"], most: float) -> Coefficients:
    """Those of one head's chunk whose gradients are taken at its start, its steps so small that together they do not overshoot.

    overlap: how much a step of token i can move the answer to key j. A row i is scaled down where `max_j sum_r gain_ir
    overlap_rj` over tokens up to i, which bounds the largest eigenvalue of what the chunk's steps do to its errors as well as
    `overlap` does, is more than `most`; from 2 on they overshoot. Only the past decides: a row may be read at any time.
    """
    moved = jnp.max(jnp.tril(product(made.read.gain, overlap)), axis=-1, keepdims=True)
    scale = jnp.where(moved > most, most / jnp.where(moved > most, moved, 1.0), 1.0)
    of = lambda rows, scale: rows._replace(gain=rows.gain * scale)
    last = scale[-1:]
    return made._replace(read=of(made.read, scale), state=of(made.state, last), momentum=of(made.momentum, last))


def mini_batch(
    row: Float[Array, "*b i"], column: Float[Array, "*b i"], real: Bool[Array, "*b i"] | None = None
) -> Coefficients:
    """TTT's (Sun et al. 2024): gain_ij = row_i column_j for j <= i, nothing decays; the last row's are the state's."""
    gain = jnp.tril(row[..., :, None] * column[..., None, :])
    if real is not None:
        gain = gain * real[..., None, :]
    one, none = jnp.ones_like(row), jnp.zeros_like(row)
    state = Rows(one[..., -1:], none[..., -1:], gain[..., -1:, :])
    momentum = Rows(none[..., -1:], none[..., -1:], jnp.zeros_like(gain[..., -1:, :]))
    return Coefficients(Rows(one, none, gain), state, momentum, None)


def pooled(
    step: Float[Array, "*b i"],
    log_keep: Float[Array, "*b n"] | None = None,
    log_momentum: Float[Array, "*b n"] | None = None,
    *,
    width: int,
) -> Coefficients:
    """With decay and momentum of blocks of `width` tokens: a token reads the weights behind the blocks that end with it or
    before (titans-pytorch's `chunk_size`; the gradient is still that at the chunk's start). A block that is not whole writes
    nothing."""
    length, blocks = step.shape[-1], step.shape[-1] // width
    read = (jnp.arange(length) + 1) // width
    if not blocks:
        one, none = jnp.ones_like(step), jnp.zeros_like(step)
        nothing = jnp.zeros((*step.shape, length), step.dtype)
        first = lambda keep, carry: Rows(keep[..., :1], carry[..., :1], nothing[..., :1, :])
        return Coefficients(Rows(one, none, nothing), first(one, none), first(none, one), None)
    whole = lambda x: None if x is None else x[..., :blocks]
    made = decayed(jnp.ones((*step.shape[:-1], blocks), step.dtype), whole(log_keep), whole(log_momentum))
    before = lambda x, first: jnp.concatenate([jnp.full_like(x[..., :1], first), x], axis=-1)
    of_token = jnp.minimum(jnp.arange(length) // width, blocks - 1)
    written = jnp.where(jnp.arange(length) < blocks * width, step, 0.0)[..., None, :]
    spread = lambda gain: gain[..., of_token] * written
    gain = jnp.concatenate([jnp.zeros_like(made.read.gain[..., :1, :]), made.read.gain], axis=-2)
    rows = Rows(before(made.read.keep, 1.0)[..., read], before(made.read.carry, 0.0)[..., read], spread(gain[..., read, :]))
    behind = lambda rows: Rows(rows.keep, rows.carry, spread(rows.gain))
    return Coefficients(rows, behind(made.state), behind(made.momentum), None)


def _sums(logs: Float[Array, "*b i"]) -> Float[Array, "*b i j"]:
    """sum_{j<r<=i} of the logarithms, -inf above the diagonal; summed anew for every j, so that none is lost to a large one."""
    length = logs.shape[-1]
    later = jnp.arange(length)[:, None] > jnp.arange(length)[None, :]
    sums = jnp.cumsum(jnp.where(later, logs[..., :, None], 0.0), axis=-2)
    return jnp.where(jnp.tril(jnp.ones((length, length), bool)), sums, -jnp.inf)
