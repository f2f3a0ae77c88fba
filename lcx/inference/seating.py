"""Seats of a state: a row that was read alone takes the place of another, and rows that have ended give back what they held."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Int

from lcx.cache.cache import Pooled
from lcx.inference.reading import Consumed


def _pooled(part: Any) -> bool:
    return isinstance(part, Pooled)


def rows_axes(empty: Callable[[int], Consumed], rows: int) -> tuple[int | None, ...]:
    """The axis of rows of every array of a state, None for states whose rows draw on one memory. empty: of so many rows."""
    few, many = (
        jax.tree.leaves(jax.eval_shape(functools.partial(empty, count)), is_leaf=_pooled) for count in (rows, 2 * rows)
    )
    differ = lambda a, b: next(n for n, pair in enumerate(zip(a.shape, b.shape, strict=True)) if pair[0] != pair[1])
    return tuple(None if _pooled(a) else differ(a, b) for a, b in zip(few, many, strict=True))


@functools.partial(jax.jit, static_argnames="axes", donate_argnames="read")
def seated(axes: tuple[int | None, ...], read: Consumed, alone: Consumed, row: Int[Array, ""]) -> Consumed:
    """The rows with the first of others in the place of one."""
    held, structure = jax.tree.flatten(read, is_leaf=_pooled)

    def put(x, new, axis: int | None):
        if axis is None:
            return _by_layer(x, lambda x, new: x.seated(new, row))(x, new)
        new = jax.lax.slice_in_dim(new, 0, 1, axis=axis).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(x, new, row, axis)

    return jax.tree.unflatten(structure, map(put, held, jax.tree.leaves(alone, is_leaf=_pooled), axes))


@functools.partial(jax.jit, donate_argnames="read")
def released(read: Consumed, rows: Bool[Array, "B"]) -> Consumed:
    """With what some rows hold of a common memory given back."""
    give = lambda x: _by_layer(x, lambda x: x.released(rows))(x) if _pooled(x) else x
    return jax.tree.map(give, read, is_leaf=_pooled)


def _by_layer(state: Pooled, act: Callable) -> Callable:
    """`act` for a state of one layer, or of layers that are stacked."""
    return jax.vmap(act) if state.overflow.ndim == 2 else act
