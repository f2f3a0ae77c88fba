"""Tokens of arrays by their places: what a policy keeps of a cache, side by side."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.target import on_one_device, platform
from pallas_kernels.token_gather import tpu

WIDE = 32  # channels from which on a token is a row to the kernel; of fewer each channel is a column


def gathered(tree: Any, index: Int[Array, "*n M"], *, growing: bool = False) -> Any:
    """Arrays [*n, M, ...] of what arrays [*n, N, ...] hold at places from 0 to N - 1.

    growing: says that no place is before the one to its left, for which the kernel for TPUs is meant; else it is looked at as
    the program runs, and of other places the kernel takes as many times as long as there are blocks of tokens. No gradient.
    """
    many = all(x.shape[index.ndim - 1] >= tpu.BLOCK and x.dtype.itemsize <= 4 for x in jax.tree.leaves(tree))
    if not (many and platform() == "tpu" and on_one_device()):
        return plainly(tree, index)
    if growing:
        return by_kernel(tree, index)
    grows = (index[..., 1:] >= index[..., :-1]).all()
    return jax.lax.cond(grows, by_kernel, functools.partial(by_kernel, growing=False), tree, index)


def is_wide(x: Shaped[Array, "..."], lead: int) -> bool:
    """Whether a token of an array [*n, N, ...], `lead` axes with that of tokens, is a row to the kernel."""
    return math.prod(x.shape[lead:]) >= WIDE


def plainly(tree: Any, index: Int[Array, "*n M"]) -> Any:
    """As XLA has it."""
    at = lambda x: index.reshape(*index.shape, *(1,) * (x.ndim - index.ndim))
    return jax.tree.map(lambda x: jnp.take_along_axis(x, at(x), axis=index.ndim - 1), tree)


def by_kernel(tree: Any, index: Int[Array, "*n M"], *, growing: bool = True, interpret: Any = False) -> Any:
    """By the kernel for TPUs: types of at most four bytes."""
    *lead, M = index.shape
    n = len(lead) + 1
    leaves, structure = jax.tree.flatten(tree)
    flat = [x.reshape(math.prod(lead), x.shape[n - 1], math.prod(x.shape[n:])) for x in leaves]
    flat = [x.astype(jnp.int8) if x.dtype == bool else x for x in flat]
    wide = [x for x in flat if is_wide(x, 2)]
    narrow = [x[..., c] for x in flat if not is_wide(x, 2) for c in range(x.shape[2])]
    rows, columns = map(iter, tpu.gathered(wide, narrow, index.reshape(-1, M), growing=growing, interpret=interpret))
    found = [next(rows) if is_wide(x, 2) else jnp.stack([next(columns) for _ in range(x.shape[2])], axis=2) for x in flat]
    made = [y.reshape(*lead, M, *x.shape[n:]).astype(x.dtype) for x, y in zip(leaves, found, strict=True)]
    return jax.tree.unflatten(structure, made)
