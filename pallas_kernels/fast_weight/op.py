"""A fast weight over rows of tokens: a scan over chunks, the last of which may be shorter.

What is kept for the backward pass are the weights before every `kept` chunks; the chunks between are computed anew.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fast_weight.chunks import chunk as one_chunk
from pallas_kernels.fast_weight.coefficients import Coefficients
from pallas_kernels.fast_weight.network import Fixed, Network, Weights


class State(NamedTuple):
    """weights, momentum: float32, leaves [B,H,...]; momentum None where the coefficients have none."""

    weights: Weights
    momentum: Weights | None = None


def fast_weight(
    network: Network,
    state: State,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    gates: tuple[Float[Array, "B T H"] | None, ...],
    coefficients: Callable[..., Coefficients],
    *,
    chunk: int,
    fixed: Fixed | None = None,
    kept: int = 4,
) -> tuple[Float[Array, "B T H E"], State, Float[Array, "B T H"]]:
    """(out, state behind the row, loss of each token at the weights where its gradient was taken), float32 or wider.

    gates: what `coefficients` makes those of a chunk of, each [B,T,H] or None, handed over as [B,H,b]. fixed: leaves [H,...].
    """
    if chunk < 1 or kept < 1:
        raise ValueError(f"fast_weight: chunk = {chunk}, kept = {kept}: expected at least 1 of each")
    length = q.shape[1]
    whole = length // chunk
    heads_first = lambda x: jnp.moveaxis(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, 1)  # [B,H,T,...]
    arrays = jax.tree.map(heads_first, (q, k, v, gates))
    step = functools.partial(_chunks, network, coefficients, fixed)
    cut = lambda x: jnp.moveaxis(x[:, :, : whole * chunk].reshape(*x.shape[:2], whole, chunk, *x.shape[3:]), 2, 0)
    outs, losses = [], []
    if whole:
        group = min(kept, whole)
        many = whole // group
        grouped = lambda x: x[: many * group].reshape(many, group, *x.shape[1:])
        pieces = jax.tree.map(cut, arrays)
        inner = jax.checkpoint(lambda state, part: jax.lax.scan(step, state, part), prevent_cse=False)
        state, found = jax.lax.scan(inner, state, jax.tree.map(grouped, pieces))
        found = jax.tree.map(lambda x: x.reshape(many * group, *x.shape[2:]), found)
        if rest := whole - many * group:
            state, more = inner(state, jax.tree.map(lambda x: x[-rest:], pieces))
            found = jax.tree.map(lambda *parts: jnp.concatenate(parts), found, more)
        join = lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], whole * chunk, *x.shape[4:])
        out, loss = jax.tree.map(join, found)
        outs.append(out)
        losses.append(loss)
    if length % chunk:
        state, (out, loss) = step(state, jax.tree.map(lambda x: x[:, :, whole * chunk :], arrays))
        outs.append(out)
        losses.append(loss)
    tokens_first = lambda parts: jnp.moveaxis(jnp.concatenate(parts, axis=2), 1, 2)
    return tokens_first(outs), state, tokens_first(losses)


def _chunks(network: Network, coefficients: Callable[..., Coefficients], fixed: Fixed | None, state: State, arrays):
    q, k, v, gates = arrays
    made = coefficients(*gates)

    def run(weights, momentum, made, q, k, v, fixed):
        return one_chunk(network, weights, momentum, made, q, k, v, fixed)

    over_heads = jax.vmap(run, in_axes=(0, 0, 0, 0, 0, 0, None if fixed is None else 0))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, 0, 0, 0, None))
    out, weights, momentum, loss = over_rows(state.weights, state.momentum, made, q, k, v, fixed)
    return State(weights, momentum), (out, loss)
