"""The recurrence of a fast weight as it is written, token by token, by automatic differentiation. Any dtype; slow."""

import jax
import jax.numpy as jnp

from pallas_kernels.fast_weight.coefficients import Gradient
from pallas_kernels.fast_weight.network import Fixed, Network, Weights


def recur(
    network: Network,
    weights: Weights,
    q,
    k,
    v,
    *,
    step,
    keep=None,
    momentum=None,
    chunk: int | None = None,
    gradient: Gradient = "start",
    fixed: Fixed | None = None,
    carried: Weights | None = None,
):
    """(out [T,E], weights, momentum) of one head. step, keep = 1 - alpha, momentum = eta: [T], None is 1 and 0. chunk: tokens
    whose gradient is taken at the weights before the first of them, where `gradient` is `start`."""
    carried = jax.tree.map(jnp.zeros_like, weights) if carried is None else carried
    out, at = [], weights
    for t in range(len(q)):
        kept = 1.0 if keep is None else keep[t]
        if gradient == "start":
            at = weights if t % chunk == 0 else at
        else:
            at = weights if gradient == "previous" else jax.tree.map(lambda w, kept=kept: kept * w, weights)
        slope = jax.grad(lambda w, t=t: network.loss(w, k[t : t + 1], v[t : t + 1], fixed)[0])(at)
        going = 0.0 if momentum is None else momentum[t]
        carried = jax.tree.map(lambda s, g, t=t, going=going: going * s - step[t] * g, carried, slope)
        weights = jax.tree.map(lambda w, s, kept=kept: kept * w + s, weights, carried)
        out.append(network(weights, q[t : t + 1], fixed)[0])
    return jnp.stack(out), weights, carried
