"""A scan in groups of steps: the backward pass keeps the state before each group and computes the steps of a group anew.

And the choice between two states for each row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


def grouped_scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    parts: Any,
    *,
    group: int,
    truncated: bool = False,
    again: bool = False,
    scan: Callable[..., tuple[Any, Any]] = jax.lax.scan,
) -> tuple[Any, Any]:
    """(state, outputs) of `jax.lax.scan(step, state, parts)`, the last group perhaps shorter.

    truncated: no gradient passes from a group to the one before; that of the first reaches `state`. again: the backward pass
    keeps of a step only the state before it, too: `n / group + group` states of n steps instead of what all steps of a group
    make, for a third computation of each. scan: of the steps of a group, by default `jax.lax.scan`.
    """
    if group < 1:
        raise ValueError(f"grouped_scan: group = {group}: expected at least 1")
    count = len(jax.tree.leaves(parts)[0])
    size = min(group, count)
    whole, rest = divmod(count, size) if count else (0, 0)
    body = jax.checkpoint(step, prevent_cse=False) if again else step

    @jax.checkpoint
    def of_group(state, first, part):
        if truncated:
            state = jax.tree.map(lambda x: jnp.where(first, x, jax.lax.stop_gradient(x)), state)
        return scan(body, state, part)

    def outer(state, given):
        return of_group(state, *given)

    if not whole:
        return jax.lax.scan(step, state, parts)
    grouped = jax.tree.map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), parts)
    state, found = jax.lax.scan(outer, state, (jnp.arange(whole) == 0, grouped))
    found = jax.tree.map(lambda x: x.reshape(whole * size, *x.shape[2:]), found)
    if rest:
        state, more = of_group(state, jnp.bool_(False), jax.tree.map(lambda x: x[-rest:], parts))
        found = jax.tree.map(lambda *both: jnp.concatenate(both), found, more)
    return state, found


def chosen(rows: Bool[Array, "B"], those: Any, others: Any) -> Any:
    """`those` in some rows, `others` elsewhere; leaves [B,...], or [...] of all rows."""
    pick = lambda a, b: jnp.where(rows.reshape(-1, *[1] * (b.ndim - 1)), a, b)
    return jax.tree.map(pick, those, others)
