"""One chunk of a fast weight, exactly and with products of matrices alone. Arrays of one head: k, q [b,D], v [b,E]."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.fast_weight.coefficients import Coefficients, Rows, bounded
from pallas_kernels.fast_weight.network import Fixed, Network, Steps, Weights, product, steps


class Held(NamedTuple):
    """Steps that tokens of the chunk took earlier, in rows that are `filled`; what the other rows hold is not read."""

    steps: Steps
    filled: Bool[Array, "b"]

    def beside(self, new: Steps) -> Steps:
        """These in their rows, new ones in the others."""
        rows = lambda x: self.filled.reshape(-1, *[1] * (x.ndim - 1))
        return jax.tree.map(lambda old, new: jnp.where(rows(old), old, new), self.steps, new)


Solve = Callable[[Float[Array, "b b"], Float[Array, "b E"]], Float[Array, "b E"]]


def substituted(lower: Float[Array, "b b"], rows: Float[Array, "b E"]) -> Float[Array, "b E"]:
    return jax.scipy.linalg.solve_triangular(
        jnp.eye(len(lower), dtype=lower.dtype) + lower, rows, lower=True, unit_diagonal=True
    )


def chunk(
    network: Network,
    weights: Weights,
    momentum: Weights | None,
    coefficients: Coefficients,
    q: Float[Array, "b D"],
    k: Float[Array, "b D"],
    v: Float[Array, "b E"],
    fixed: Fixed | None = None,
    *,
    overshoot: float | None = None,
    held: Held | None = None,
    solve: Solve = substituted,
) -> tuple[Float[Array, "b E"], Weights, Weights | None, Float[Array, "b"], Steps]:
    """(what each token reads, weights and momentum behind the chunk, loss of each token where its gradient was taken, steps).

    Without a momentum there is none: coefficients are those without `log_momentum`. overshoot: see `bounded`; None is no bound.
    held: the loss of rows that are held means nothing. solve: (I + N)^{-1} R, for gradients that are taken at every token.
    """
    if coefficients.gradient is not None:
        made, loss = _delta_steps(weights, momentum, coefficients.gradient, k, v, held, solve)
    else:
        made, loss = steps(network, weights, k, v, fixed, reaching=overshoot is not None)
        made = made if held is None else held.beside(made)
    coefficients = coefficients if overshoot is None else bounded(coefficients, overlap(made), overshoot)
    out = read(network, weights, momentum, coefficients.read, made, q, fixed)
    return out, *behind(weights, momentum, coefficients, made), loss, made


def overlap(made: Steps) -> Float[Array, "b b"]:
    """An estimate of how much a step of one token can move the answer to the key of another."""
    reach = [made.reach[:, n : n + 1] for n in range(len(made.inputs))]
    each = [jnp.abs(product(x, x.T)) * product(r, r.T) for x, r in zip(made.inputs, reach, strict=True)]
    return sum(each) + (0.0 if made.gain is None else 1.0)  # a gain's input is of size 1 at every token


def read(
    network: Network,
    weights: Weights,
    momentum: Weights | None,
    rows: Rows,
    made: Steps,
    q: Float[Array, "r D"],
    fixed: Fixed | None,
) -> Float[Array, "r E"]:
    """What queries find in the weights of these rows, `gain` [r,b]."""
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


def behind(
    weights: Weights, momentum: Weights | None, coefficients: Coefficients, made: Steps
) -> tuple[Weights, Weights | None]:
    """Weights and momentum behind the chunk."""
    state = _left(weights, momentum, coefficients.state, made)
    return state, None if momentum is None else _left(weights, momentum, coefficients.momentum, made)


def _left(weights: Weights, momentum: Weights | None, rows: Rows, made: Steps) -> Weights:
    """keep W + carry S - sum_j gain_j x_j^T e_j of the only row."""
    keep, carry, gain = rows.keep[0], rows.carry[0], rows.gain
    taken = Weights(
        tuple(product(x.T * gain, e) for x, e in zip(made.inputs, made.gradients, strict=True)),
        tuple(product(gain, e)[0] for e in made.gradients) if weights.biases else (),
        None if weights.gain is None else product(gain, made.gain)[0],
    )
    left = jax.tree.map(lambda w, t: keep * w - t, weights, taken)
    return left if momentum is None else jax.tree.map(lambda w, s: w + carry * s, left, momentum)


def _delta_steps(
    weights: Weights, momentum: Weights | None, rows: Rows, k: Array, v: Array, held: Held | None, solve: Solve
) -> tuple[Steps, Array]:
    """Gradients that are each taken where the tokens before have left a linear memory: (I + tril(L * K K^T)) E = ... - V."""
    (matrix,) = weights.matrices
    start = rows.keep[:, None] * product(k, matrix) - v
    if momentum is not None:
        start += rows.carry[:, None] * product(k, momentum.matrices[0])
    if held is not None:
        k = jnp.where(held.filled[:, None], held.steps.inputs[0], k)
        start = jnp.where(held.filled[:, None], held.steps.gradients[0], start)
    system = jnp.tril(rows.gain * product(k, k.T), -1)
    if held is not None:
        system = jnp.where(held.filled[:, None], 0, system)
    e = solve(system, start)
    return Steps((k,), (e,), None), jnp.sum(e**2, axis=-1) / 2
