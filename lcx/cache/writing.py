"""How blocks of tokens get into slots: behind those in use, side by side, in place.

A scatter would say the same, but the compiler for TPUs makes of it a loop over every token of every head. Here a window of
slots is cut out, takes what is new and goes back, once a row, on each device for the slots that it holds.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int, Shaped

from lcx.attention.split_keys import split_axes
from lcx.parallel.rules import Rules, ambient_mesh


def in_place(write: Callable[[Any], Any], held: Any, wanted: Bool[Array, ""], after: Array) -> Any:
    """write(held) where it is wanted, without a copy of what is held: behind a loop of a turn at most, across which XLA fuses
    nothing and which it sees to come after what was made of it before, `after`. No gradient."""
    turns = jnp.minimum(wanted.astype(jnp.int32), 1 + jnp.isnan(after.sum()).astype(jnp.int32))
    return jax.lax.fori_loop(0, turns, lambda _, held: write(held), held)


def with_blocks(
    held: Any,
    new: Any,
    first: Int[Array, "B G"],
    count: Int[Array, "B"],
    *,
    blocks: int,
    rules: Rules = Rules(),
    layer: Int[Array, ""] | None = None,
) -> Any:
    """Arrays [B, K or G, in proportion to the slots, ...] with the first `count` of new blocks of tokens from block `first` of
    the slots on, of each of G heads or of all heads alike. What finds no slot is dropped.

    new: of `blocks` blocks. rules: how the arrays lie on a mesh. layer: of arrays [L, B, ...], the one that is written.
    """
    old, structure = jax.tree.flatten(held)
    fresh = [x.astype(y.dtype) for x, y in zip(jax.tree.leaves(new), old, strict=True)]
    lead, axes, G = 0 if layer is None else 1, split_axes(rules), first.shape[1]

    def local(old, fresh, first, count, layer):
        if axes:
            own = old[0].shape[lead + 2] * blocks // fresh[0].shape[2]
            first = first - jax.lax.axis_index(axes) * own

        def row(i, old):
            at = *(() if layer is None else (layer,)), i // first.shape[1], i % first.shape[1]
            begin, n = first[at[-2:]], count[at[-2]]
            return [_with_row(x, y, at, first.shape[1], begin, n, blocks) for x, y in zip(old, fresh, strict=True)]

        return row(0, old) if first.size == 1 else jax.lax.fori_loop(0, first.size, row, old)

    if ambient_mesh() is None:
        return jax.tree.unflatten(structure, local(old, fresh, first, count, layer))
    by_head = "kv_heads" if G > 1 else None
    heads = ["kv_heads" if x.shape[lead + 1] > G else by_head for x in old]
    spec = lambda x, *names: rules.partition(names[: x.ndim])
    slots = [spec(x, *(None,) * lead, "batch", head, "slots") for x, head in zip(old, heads, strict=True)]
    given = [spec(x, "batch", head) for x, head in zip(fresh, heads, strict=True)]
    specs = slots, given, spec(first, "batch", by_head), spec(count, "batch"), None if layer is None else PartitionSpec()
    made = jax.shard_map(local, in_specs=specs, out_specs=slots, check_vma=False)(old, fresh, first, count, layer)
    return jax.tree.unflatten(structure, made)


def _with_row(
    old: Shaped[Array, "..."],
    new: Shaped[Array, "B K n ..."],
    at: tuple[Any, ...],
    heads: int,
    first: Int[Array, ""],
    count: Int[Array, ""],
    blocks: int,
) -> Shaped[Array, "..."]:
    """With new blocks of a row and one of `heads` shares of its heads. at: (layer, row, share), or the last two. first: may lie
    before the slots, or behind them."""
    *layer, row, share = at
    size, each, here, rest = new.shape[1] // heads, new.shape[2] // blocks, old.shape[len(at)], new.shape[3:]
    zeros = (0,) * len(rest)
    new = jax.lax.dynamic_slice(new, (row, share * size, 0, *zeros), (1, size, *new.shape[2:]))
    for begin in range(0, blocks * each, here):  # as many at a time as there are slots
        n = min(here, blocks * each - begin)
        start = first * each + begin
        place = jnp.clip(start, 0, here - n)
        token = jnp.arange(n) + place - start
        wanted = (token >= 0) & (token < jnp.minimum(n, count * each - begin))
        some = jnp.take(new[:, :, begin : begin + n], jnp.clip(token, 0, n - 1), axis=2)
        window = *layer, row, share * size, place, *zeros
        was = _laid(jax.lax.dynamic_slice(old, window, (*(1,) * len(layer), 1, size, n, *rest)))
        now = jnp.where(wanted.reshape(n, *(1,) * len(rest)), some.reshape(was.shape), was)
        old = _laid(jax.lax.dynamic_update_slice(old, _laid(now), window))
    return old


def _laid(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """In the layout of slots that kernels read, else XLA copies all slots into one that suits the window. Of positions, whose
    few channels it would pad, XLA knows better."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if x.shape[-1] >= 8 else x
