"""Raw keys in a TPU kernel: cosines and sines of a tile's slots, beside each other, as they are given or made of positions."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import angles
from pallas_kernels.quantized_attention.formats import Plan, Slots, channels, widened
from pallas_kernels.quantized_attention.tpu_formats import Operand


def operands(plan: Plan, slots: Slots) -> dict[str, Operand]:
    """What a kernel is given of the turns of keys."""
    B, D = slots.used.shape[0], channels(slots.k)
    if slots.turning is not None:
        rows, _, S = slots.tokens.index.shape
        positions = slots.turning.positions.astype(jnp.float32).reshape(rows, -1, S)
        wide = jnp.broadcast_to(lanes(slots, D, plan.pairing), (B, 8, width(plan, slots)))
        return {"position": Operand(positions, 2), "lanes": Operand(wide)}
    return {"turn": Operand(tables(slots, B, D, plan.pairing), 2)} if slots.pairs else {}


def width(plan: Plan, slots: Slots) -> int:
    """Lanes of cosines and sines beside each other: of pairs where they fill the channels, else of channels."""
    D = channels(slots.k)
    return D if plan.pairing == "half" and 2 * slots.pairs == D else 2 * D


def tables(slots: Slots, B: int, D: int, pairing: str) -> Float[Array, "B heads S W"]:
    """Cosine and sine beside each other."""
    found = [x.reshape(B, -1, *x.shape[1:]) for x in (slots.cosine, slots.sine)]
    if pairing != "half" or 2 * slots.pairs != D:
        found = [widened(x, D, pairing, rest) for x, rest in zip(found, (1.0, 0.0), strict=True)]
    return jnp.concatenate(found, axis=-1)


def lanes(slots: Slots, D: int, pairing: str) -> Float[Array, "8 W"]:
    """Of each lane of such a table: parts of its turn, a quarter of a turn more for a cosine, and its factor."""
    found = slots.turning.lanes(D, pairing)
    pairs = slots.pairs if pairing == "half" and 2 * slots.pairs == D else D
    quarter = jnp.repeat(jnp.asarray([0.25, 0.0]), pairs)
    rows = jnp.concatenate([found[:, :pairs]] * 2, axis=1)
    return jnp.concatenate([rows, quarter[None], jnp.zeros((3, 2 * pairs))])


def turning(refs: SimpleNamespace, h) -> None:
    """Cosines and sines of a tile, made of its positions."""
    row = refs.position[pl.ds(h, 1), :]
    position = jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]
    lane = lambda n: refs.lanes[n : n + 1, :]
    angle = angles.turns(position, lane(0), lane(1), lane(2))
    refs.table[...] = angles.sine(angle + lane(4)) * lane(3)


def turn(refs: SimpleNamespace, h) -> tuple[Float[Array, "bk D"], Float[Array, "bk D"]]:
    """Cosine and sine of the slots, a channel each."""
    D = refs.q.shape[-1]
    given = lambda: refs.turn[0 if refs.turn.shape[0] == 1 else h].astype(jnp.float32)
    table = refs.table[...] if hasattr(refs, "table") else given()
    if table.shape[1] == 2 * D:
        return table[:, :D], table[:, D:]
    swapped = pltpu.roll(table, D // 2, 1)
    low = jax.lax.broadcasted_iota(jnp.int32, table.shape, 1) < D // 2
    return jnp.where(low, table, swapped), jnp.where(low, swapped, table)
