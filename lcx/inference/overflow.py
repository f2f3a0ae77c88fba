"""Tokens that found no slot in the caches of rows: what is read or written behind them lacks them, and is no answer."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lcx.models.decoder import DecoderModel


class CacheOverflow(RuntimeError):
    """Tokens of a row found no slot in some cache, so that what came behind them was made without them."""


@functools.partial(jax.jit, static_argnames="rows")
def unplaced(state: Any, rows: int) -> Int[Array, "B"]:
    """Tokens of each row that found no slot, of all caches of a model's state."""
    counts = [jnp.asarray(part.overflow).reshape(-1, rows).sum(axis=0, dtype=jnp.int32) for _, part in _counting(state)]
    return sum(counts, jnp.zeros(rows, jnp.int32))


def overflow_of(model: DecoderModel, state: Any, row: int) -> CacheOverflow:
    """What to say of a row of a state in which tokens found no slot."""
    said, remedies = [], {}
    for path, part in _counting(state):
        counts = np.asarray(part.overflow)
        for at in np.argwhere(counts[..., row] > 0):
            where = _where(path, at.tolist(), len(model.spec.pattern))
            said.append(f"{counts[(*at, row)]} tokens found no slot in {where} ({type(part).__name__})")
            remedies[part.remedy] = None
    more = f" and {len(said) - 1} more of its caches" if len(said) > 1 else ""
    return CacheOverflow(f"row {row}: {said[0]}{more}: expected {'; or '.join(remedies)}")


def check_overflow(model: DecoderModel, state: Any, unplaced: Int[np.ndarray, "B"], used: Bool[np.ndarray, "B"]) -> None:
    """Raises CacheOverflow for the first row in use, of a state, that has tokens without a slot."""
    if (rows := np.flatnonzero(used & (unplaced > 0))).size:
        raise overflow_of(model, state, int(rows[0]))


def _counting(state: Any) -> Iterator[tuple[tuple, Any]]:
    """(path, part) of the parts of a state that count tokens without a slot."""
    counts = lambda part: hasattr(part, "overflow")
    found = jax.tree_util.tree_leaves_with_path(state, is_leaf=counts)
    return ((path, part) for path, part in found if counts(part))


def _where(path: tuple, at: list[int], slots: int) -> str:
    """The layer of a model of so many slots a period, where states are by slot or by period, and the part of its state."""
    keys = [getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))) for key in path]
    if "layers" not in keys:
        return f"state{jax.tree_util.keystr(path)}" + "".join(f"[{n}]" for n in at)
    rest = keys[keys.index("layers") + 1 :]
    numbers = [key for key in rest[:2] if isinstance(key, int)]
    period, slot = (*at, *numbers) if at else numbers
    names = ".".join(str(key) for key in rest[len(numbers) :])
    return f"layer {period * slots + slot}" + (f", its {names}" if names else "")
