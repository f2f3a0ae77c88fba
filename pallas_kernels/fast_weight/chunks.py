"""One chunk of a fast weight, exactly and with products of matrices alone. Arrays of one head: k, q [b,D], v [b,E]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fast_weight.coefficients import Coefficients, Rows
from pallas_kernels.fast_weight.network import Fixed, Network, Steps, Weights, product, steps


def chunk(
    network: Network,
    weights: Weights,
    momentum: Weights | None,
    coefficients: Coefficients,
    q: Float[Array, "b D"],
    k: Float[Array, "b D"],
    v: Float[Array, "b E"],
    fixed: Fixed | None = None,
) -> tuple[Float[Array, "b E"], Weights, Weights | None, Float[Array, "b"]]:
    """(what each token reads, weights and momentum behind the chunk, loss of each token where its gradient was taken).

    Without a momentum there is none: coefficients are those without `log_momentum`.
    """
    if coefficients.gradient is None:
        made, loss = steps(network, weights, k, v, fixed)
    else:
        made, loss = _delta_steps(weights, momentum, coefficients.gradient, k, v)
    out = _read(network, weights, momentum, coefficients.read, made, q, fixed)
    state = _behind(weights, momentum, coefficients.state, made)
    carried = None if momentum is None else _behind(weights, momentum, coefficients.momentum, made)
    return out, state, carried, loss


def _read(
    network: Network, weights: Weights, momentum: Weights | None, rows: Rows, made: Steps, q: Array, fixed: Fixed | None
) -> Array:
    keep, carry = rows.keep[:, None], rows.carry[:, None]
    y = q
    for n, matrix in enumerate(weights.matrices):
        scores = product(y, made.inputs[n].T) + (1.0 if weights.biases else 0.0)
        r = keep * product(y, matrix) - product(scores * rows.gain, made.gradients[n])
        if weights.biases:
            r += keep * weights.biases[n]
        if momentum is not None:
            r += carry * (product(y, momentum.matrices[n]) + (momentum.biases[n] if weights.biases else 0.0))
        y = network.act(r)
    gain = None
    if weights.gain is not None:
        gain = keep * weights.gain - product(rows.gain, made.gain)
        gain += 0.0 if momentum is None else carry * momentum.gain
    return network.finish(r, q, gain, fixed)


def _behind(weights: Weights, momentum: Weights | None, rows: Rows, made: Steps) -> Weights:
    """keep W + carry S - sum_j gain_j x_j^T e_j of the only row."""
    keep, carry, gain = rows.keep[0], rows.carry[0], rows.gain[0][:, None]
    taken = Weights(
        tuple(product(x.T, gain * e) for x, e in zip(made.inputs, made.gradients, strict=True)),
        tuple(jnp.sum(gain * e, axis=0) for e in made.gradients) if weights.biases else (),
        None if weights.gain is None else jnp.sum(gain * made.gain, axis=0),
    )
    left = jax.tree.map(lambda w, t: keep * w - t, weights, taken)
    return left if momentum is None else jax.tree.map(lambda w, s: w + carry * s, left, momentum)


def _delta_steps(weights: Weights, momentum: Weights | None, rows: Rows, k: Array, v: Array) -> tuple[Steps, Array]:
    """Gradients that are each taken where the tokens before have left a linear memory: (I + tril(L * K K^T)) E = ... - V."""
    (matrix,) = weights.matrices
    start = rows.keep[:, None] * product(k, matrix) - v
    if momentum is not None:
        start += rows.carry[:, None] * product(k, momentum.matrices[0])
    system = jnp.eye(len(k), dtype=k.dtype) + jnp.tril(rows.gain * product(k, k.T), -1)
    e = jax.scipy.linalg.solve_triangular(system, start, lower=True, unit_diagonal=True)
    return Steps((k,), (e,), None), jnp.sum(e**2, axis=-1) / 2
