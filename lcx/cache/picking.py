"""Which tokens of slots, and they taken out: in their order, side by side, on each device for the heads that it holds."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lcx.attention.split_keys import split_axes
from lcx.parallel.rules import Rules, ambient_mesh
from pallas_kernels.token_gather import op


def places(there: Bool[Array, "*n N"], count: int) -> Int[Array, "*n C"]:
    """The first `count` places where something is there, in order; where there are fewer, the last of them again, or 0."""
    N = there.shape[-1]
    place = jnp.where(there, jnp.arange(N), N)
    last = jnp.where(there, jnp.arange(N), 0).max(axis=-1, keepdims=True)
    found = jnp.minimum(jnp.sort(place, axis=-1)[..., :count], last)
    return jnp.concatenate([found, jnp.broadcast_to(last, (*found.shape[:-1], max(0, count - N)))], axis=-1)


def picked(tree: Any, index: Int[Array, "B G C"], *, rules: Rules = Rules(), growing: bool = False) -> Any:
    """Arrays [B, K or G, C, ...] of what arrays [B, K or G, N, ...] hold at places, of each of G heads or of all heads alike.

    rules: how arrays lie on a mesh. growing: says that no place is before the one to its left.
    """
    leaves, structure = jax.tree.flatten(tree)
    fetch = functools.partial(op.gathered, growing=growing)

    def take(these):
        at = jnp.broadcast_to(index, (*these[0].shape[:2], index.shape[2]))
        return fetch(these, at) if split_axes(rules) else on_own_heads(fetch, these, at, rules=rules)

    kinds = [n if op.is_wide(x, 3) else ("narrow", x.shape[1]) for n, x in enumerate(leaves)]  # which are taken together
    found = {kind: iter(take([x for x, k in zip(leaves, kinds, strict=True) if k == kind])) for kind in dict.fromkeys(kinds)}
    return jax.tree.unflatten(structure, [next(found[kind]) for kind in kinds])


def on_own_heads(run: Callable[..., Any], tokens: Any, *trees: Any, rules: Rules, axis: str | None = None) -> Any:
    """run(tokens, *trees) of arrays [B, K, ...], which gives such ones: on a mesh each device for the rows and heads that it
    holds. axis: of `tokens` [B, K, C, ...] and of what is made of them, which blocks of C are shared out by too."""
    if ambient_mesh() is None:
        return run(tokens, *trees)
    several = jax.tree.leaves(tokens)[0].shape[1] > 1
    by = lambda *more: rules.partition(("batch", "kv_heads" if several else None, *more))
    specs = by(axis), *(by() for _ in trees)
    return jax.shard_map(run, in_specs=specs, out_specs=by(axis), check_vma=False)(tokens, *trees)


def by_parts(run: Callable[..., Any], *trees: Any, size: int) -> Any:
    """run(*trees) of arrays [B, G, N, ...], of each token by itself, so many tokens at a time: what it makes of some of them
    beside all others need not be there at once."""
    N = jax.tree.leaves(trees)[0].shape[2]
    if size >= N:
        return run(*trees)

    def whole(x):
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :N]

    return jax.tree.map(whole, jax.lax.map(lambda parts: run(*parts), cut_up(trees, size=size)))


def cut_up(tree: Any, size: int) -> Any:
    """Arrays [B, G, N, ...] as [parts, B, G, size, ...], zeros behind the last."""

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size), *((0, 0),) * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, size, *x.shape[3:]), 2, 0)

    return jax.tree.map(cut, tree)
