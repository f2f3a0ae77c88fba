"""One chunk of a fast weight, exactly and with products of matrices alone. Arrays of one head: k, q [b,D], v [b,E]."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fast_weight.coefficients import Coefficients, Rows
from pallas_kernels.fast_weight.network import Fixed, Network, Steps, Weights, steps


def chunk(
    network: Network,
    weights: Weights,
    momentum: Weights,
    coefficients: Coefficients,
    q: Float[Array, "b D"],
    k: Float[Array, "b D"],
    v: Float[Array, "b E"],
    fixed: Fixed | None = None,
) -> tuple[Float[Array, "b E"], Weights, Weights, Float[Array, "b"]]:
    """(what each token reads, weights and momentum behind the chunk, loss of each token where its gradient was taken)."""
    if coefficients.gradient is None:
        made, loss = steps(network, weights, k, v, fixed)
    else:
        made, loss = _delta_steps(weights, momentum, coefficients.gradient, k, v)
    out = _read(network, weights, momentum, coefficients.read, made, q, fixed)
    state, carried = (_behind(weights, momentum, rows, made) for rows in (coefficients.state, coefficients.momentum))
    return out, state, carried, loss


def _read(
    network: Network, weights: Weights, momentum: Weights, rows: Rows, made: Steps, q: Array, fixed: Fixed | None
) -> Array:
    keep, carry = rows.keep[:, None], rows.carry[:, None]
    y = q
    for n, matrix in enumerate(weights.matrices):
        product = y @ made.inputs[n].T + (1.0 if weights.biases else 0.0)
        r = keep * (y @ matrix) + carry * (y @ momentum.matrices[n]) - (product * rows.gain) @ made.gradients[n]
        if weights.biases:
            r += keep * weights.biases[n] + carry * momentum.biases[n]
        y = network.act(r)
    gain = None
    if weights.gain is not None:
        gain = keep * weights.gain + carry * momentum.gain - rows.gain @ made.gain
    return network.finish(r, q, gain, fixed)


def _behind(weights: Weights, momentum: Weights, rows: Rows, made: Steps) -> Weights:
    """keep W + carry S - sum_j gain_j x_j^T e_j of the only row."""
    keep, carry, gain = rows.keep[0], rows.carry[0], rows.gain[0][:, None]
    mix = lambda w, s, taken: keep * w + carry * s - taken
    pairs = zip(weights.matrices, momentum.matrices, made.inputs, made.gradients, strict=True)
    matrices = tuple(mix(w, s, x.T @ (gain * e)) for w, s, x, e in pairs)
    pairs = zip(weights.biases, momentum.biases, made.gradients, strict=False)
    biases = tuple(mix(w, s, jnp.sum(gain * e, axis=0)) for w, s, e in pairs)
    of_output = None if weights.gain is None else mix(weights.gain, momentum.gain, jnp.sum(gain * made.gain, axis=0))
    return Weights(matrices, biases, of_output)


def _delta_steps(weights: Weights, momentum: Weights, rows: Rows, k: Array, v: Array) -> tuple[Steps, Array]:
    """Gradients that are each taken where the tokens before have left a linear memory: (I + tril(L * K K^T)) E = ... - V."""
    (matrix,), (carried,) = weights.matrices, momentum.matrices
    start = rows.keep[:, None] * (k @ matrix) + rows.carry[:, None] * (k @ carried) - v
    system = jnp.eye(len(k), dtype=k.dtype) + jnp.tril(rows.gain * (k @ k.T), -1)
    e = jax.scipy.linalg.solve_triangular(system, start, lower=True, unit_diagonal=True)
    return Steps((k,), (e,), None), jnp.sum(e**2, axis=-1) / 2
