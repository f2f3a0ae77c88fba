"""A function of single tokens over a long row: a few tokens at a time, its weights gathered once.

What the function makes inside exists for one chunk of tokens at a time, forward and backward, where chunks are recomputed (the
feed-forward of the blockwise parallel transformer, Liu and Abbeel 2023; the head of a long row). On a mesh each device cuts
up the tokens that it holds, so none of them moves. It gathers the weights before its first chunk, matrices in the compute
dtype, adds their gradients up in float32, and keeps its own share of the sum over devices after the last (reduce-scatter).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.parallel.gathered import Spread, axes_size, gather, logical_axes, on_shares, partition, scatter, spread_of, token_axes
from lcx.parallel.rules import Rules


class Weights(NamedTuple):
    """Arrays of a module that a function reads, their logical axes, and the module with others in their place."""

    arrays: tuple[Array, ...]
    axes: tuple[tuple[str | None, ...], ...]
    bind: Callable[[Sequence[Array]], nnx.Module]


def weights_of(module: nnx.Module, function: Callable[..., Any], *arguments: Any) -> Weights:
    """What `function(module, *arguments)` reads of the module."""
    leaves, tree = jax.tree.flatten(module)
    blank = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    jaxpr = jax.make_jaxpr(lambda leaves: function(tree.unflatten(leaves), *arguments))(blank).jaxpr
    used = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read = [i for i, variable in enumerate(jaxpr.invars) if id(variable) in used]
    axes = _axes(module)

    def bind(arrays):
        given = dict(zip(read, arrays, strict=True))
        return tree.unflatten([given.get(i, leaf) for i, leaf in enumerate(blank)])

    return Weights(tuple(leaves[i] for i in read), tuple(axes[i] for i in read), bind)


class _Plan(NamedTuple):
    """What is static. gathered: of each weight, over which mesh axes it is gathered along each dimension, and in which dtype.
    rows, sequence: the mesh axes that share out the tokens."""

    function: Callable[..., Any]
    gathered: tuple[tuple[Spread, Any], ...]
    chunk: int
    rows: tuple[str, ...]
    sequence: tuple[str, ...]

    @property
    def over(self) -> tuple[str, ...]:
        return (*self.rows, *self.sequence)


def tokenwise(
    function: Callable[[nnx.Module, Float[Array, "B t M"], Int[Array, "B t"]], Any],
    weights: Weights,
    x: Float[Array, "B T M"],
    ids: Int[Array, "B T"],
    *,
    chunk: int,
    rules: Rules,
    compute: str,
) -> Any:
    """`function(module, x, ids)`, a tree of arrays [B, T, ...], on at most `chunk` tokens of each row of a device at a time.

    The output at a token may depend on that token alone, and weights of two axes or more are matrices, which the function
    casts to `compute` before it uses them. Raises ValueError if the tokens do not divide over the devices.
    """
    rows, sequence = token_axes(rules)
    if x.shape[0] % axes_size(rows) or x.shape[1] % axes_size(sequence):
        grid = f"{axes_size(rows)} x {axes_size(sequence)}"
        raise ValueError(f"tokens: {x.shape[0]} rows of {x.shape[1]} do not divide over {grid} devices")

    def gathering(leaf, axes):
        return spread_of(axes, rules, (*rows, *sequence)), jnp.dtype(compute) if leaf.ndim > 1 else leaf.dtype

    bound = lambda arrays, x, ids: function(weights.bind(arrays), x, ids)
    plan = _Plan(bound, tuple(map(gathering, weights.arrays, weights.axes)), chunk, rows, sequence)
    return _run(plan, weights.arrays, x, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(plan: _Plan, weights, x, ids):
    def local(weights, x, ids):
        held = _gathered(plan, weights)
        return _sweep(lambda none, x, ids: (none, plan.function(held, x, ids)), None, plan.chunk, x, ids)[1]

    shares, tokens = _partitions(plan)
    return on_shares(local, (shares, tokens, tokens), tokens, plan.over)(weights, x, ids)


def _save(plan, weights, x, ids):
    return _run(plan, weights, x, ids), (weights, x, ids)


def _pull(plan, saved, cotangents):
    def local(weights, x, ids, slopes):
        held = _gathered(plan, weights)

        def step(sums, x, ids, slopes):
            _, pull = jax.vjp(lambda held, x: _floats(plan.function(held, x, ids)), held, x)
            d_held, d_x = pull(slopes)
            return jax.tree.map(lambda total, d: total + d.astype(jnp.float32), sums, d_held), d_x

        zeros = tuple(jnp.zeros(leaf.shape, jnp.float32) for leaf in held)
        sums, d_x = _sweep(step, zeros, plan.chunk, x, ids, slopes)
        return _scattered(plan, sums), d_x

    shares, tokens = _partitions(plan)
    run = on_shares(local, (shares, tokens, tokens, tokens), (shares, tokens), plan.over)
    return *run(*saved, _floats(cotangents)), None


_run.defvjp(_save, _pull)


def _sweep(step, carry, chunk: int, *arrays):
    """A scan of `step(carry, *chunks) -> (carry, y)` over chunks of [B, T, ...] arrays, as equal as they can be."""
    length = arrays[1].shape[1]
    n = -(-length // chunk)
    if n <= 1:
        return step(carry, *arrays)
    size = -(-length // n)

    def cut(leaf):
        # Zero as a literal: JAX 0.10 takes an array made in here for a weight where the backward pass of a scan has a gradient.
        around = [(0, 0, 0), (0, n * size - length, 0)] + [(0, 0, 0)] * (leaf.ndim - 2)
        leaf = jax.lax.pad(leaf, np.zeros((), leaf.dtype), around)
        return jnp.moveaxis(leaf.reshape(leaf.shape[0], n, size, *leaf.shape[2:]), 1, 0)

    def join(leaf):
        return jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], n * size, *leaf.shape[3:])[:, :length]

    carry, y = jax.lax.scan(lambda carry, part: step(carry, *part), carry, jax.tree.map(cut, arrays))
    return carry, jax.tree.map(join, y)


def _gathered(plan: _Plan, weights):
    """The whole of every weight, in the dtype that it is used in."""
    return tuple(gather(leaf.astype(dtype), spread) for leaf, (spread, dtype) in zip(weights, plan.gathered, strict=True))


def _scattered(plan: _Plan, sums):
    """This device's share of every gradient, summed over devices."""
    return tuple(scatter(leaf, spread, plan.over) for leaf, (spread, _) in zip(sums, plan.gathered, strict=True))


def _partitions(plan: _Plan):
    """Of the weights, and of arrays [B, T, ...]."""
    return tuple(partition(spread) for spread, _ in plan.gathered), partition((plan.rows, plan.sequence))


def _axes(module: nnx.Module) -> list[tuple[str | None, ...]]:
    """The logical axes of every array of a module, in the order of `jax.tree.leaves`."""
    nodes = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [logical_axes(node, jnp.ndim(node[...])) for node in nodes]


def _floats(outputs) -> list[Array]:
    """The leaves that have a gradient."""
    return [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(leaf.dtype, jnp.floating)]
