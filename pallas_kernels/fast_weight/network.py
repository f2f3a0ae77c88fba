"""The inner networks of fast weights: what a memory is, and the gradient of its loss.

    x_1 = k,  z_l = x_l W_l + b_l,  x_{l+1} = act(z_l),  f(k) = output(z_n, k)

Output `plain` is z_n; `norm` is k + w LN(z_n) + c with weights of the model's own (TTT, Sun et al. 2024, whose target v - k of
LN alone is the target v of this); `gain` is k + (1 + g) LN(z_n) with g a fast weight too (titans-pytorch).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.target import precision


class Weights(NamedTuple):
    """Fast weights of one head. matrices: [in,out] of each layer. biases: of each layer, or none. gain: of the output."""

    matrices: tuple[Float[Array, "i o"], ...]
    biases: tuple[Float[Array, "o"], ...] = ()
    gain: Float[Array, "E"] | None = None


class Fixed(NamedTuple):
    """Weights of the output that no token changes."""

    weight: Float[Array, "E"]
    bias: Float[Array, "E"]


ACTIVATIONS = {
    "gelu": lambda x: x / 2 * (1 + jax.lax.erf(x * 0.5**0.5)),  # `jax.nn.gelu` asks for erfc, which Mosaic lacks
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def product(a: Float[Array, "*b i j"], b: Float[Array, "*b j k"]) -> Float[Array, "*b i k"]:
    """Of matrices, float32 ones multiplied as such on every platform."""
    return jnp.matmul(a, b, precision=precision(a.dtype))


@dataclasses.dataclass(frozen=True)
class Network:
    """activation: between matrices. output: see above. target: a step goes down ||f(k) - v||^2 / 2 (`regression`), or up
    f(k) v (`hebbian`: linear attention), whose gradient is -v whatever the weights are."""

    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    output: Literal["plain", "norm", "gain"] = "plain"
    target: Literal["regression", "hebbian"] = "regression"
    eps: float = 1e-5

    def act(self, x: Array) -> Array:
        return ACTIVATIONS[self.activation](x)

    def finish(self, z: Array, x: Array, gain: Array | None, fixed: Fixed | None) -> Array:
        """The output map of rows z [..., E] for inputs x; gain may differ from row to row."""
        if self.output == "plain":
            return z
        centred = z - z.mean(axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + self.eps)
        if self.output == "gain":
            return x + (1 + gain) * normed
        return x + fixed.weight * normed + fixed.bias

    def __call__(self, weights: Weights, x: Float[Array, "b D"], fixed: Fixed | None = None) -> Float[Array, "b E"]:
        """f of rows of keys or queries."""
        first = x
        for n, matrix in enumerate(weights.matrices):
            z = product(x, matrix) + (weights.biases[n] if weights.biases else 0.0)
            x = self.act(z)
        return self.finish(z, first, weights.gain, fixed)

    def loss(self, weights: Weights, k: Float[Array, "b D"], v: Float[Array, "b E"], fixed: Fixed | None = None) -> Array:
        """Of each row."""
        found = self(weights, k, fixed)
        if self.target == "hebbian":
            return -jnp.sum(found * v, axis=-1)
        return jnp.sum((found - v) ** 2, axis=-1) / 2


class Steps(NamedTuple):
    """Of a chunk's tokens, row by row: the inputs x of each layer and the gradients e of its outputs, and of the gain. reach:
    how far f moves, at most, for a move of each layer's outputs, where it is asked for."""

    inputs: tuple[Float[Array, "b i"], ...]
    gradients: tuple[Float[Array, "b o"], ...]
    gain: Float[Array, "b E"] | None
    reach: Float[Array, "b n"] | None = None


STEEPEST = 1.13  # slope of GELU; of the others less
POWERS = 4  # iterations for a spectral norm


def steps(
    network: Network, weights: Weights, k: Array, v: Array, fixed: Fixed | None, *, reaching: bool = False
) -> tuple[Steps, Array]:
    """(steps, loss of each token) at one set of weights."""
    inputs, backward, x = [], [], k
    for n, matrix in enumerate(weights.matrices):
        inputs.append(x)
        z = product(x, matrix) + (weights.biases[n] if weights.biases else 0.0)
        if n + 1 < len(weights.matrices):
            x, vjp = jax.vjp(network.act, z)
            backward.append(vjp)
    gain = None if weights.gain is None else jnp.broadcast_to(weights.gain, z.shape)
    found, vjp = jax.vjp(lambda z, gain: network.finish(z, k, gain, fixed), z, gain)
    hebbian = network.target == "hebbian"
    error = -v if hebbian else found - v
    e, d_gain = vjp(error)
    gradients = [e]
    for n in range(len(weights.matrices) - 1, 0, -1):
        (e,) = backward[n - 1](product(e, weights.matrices[n].T))
        gradients.append(e)
    loss = -jnp.sum(found * v, axis=-1) if hebbian else jnp.sum(error**2, axis=-1) / 2
    reach = _reach(network, weights, z, fixed) if reaching else None
    return Steps(tuple(inputs), tuple(reversed(gradients)), d_gain, reach), loss


def _reach(network: Network, weights: Weights, z: Array, fixed: Fixed | None) -> Float[Array, "b n"]:
    """Of the last layer the slope of the output map, of those before it times the norms of the matrices between."""
    last = jnp.ones((len(z), 1), z.dtype)
    if network.output != "plain":
        factor = 1 + weights.gain if network.output == "gain" else fixed.weight
        last = jnp.max(jnp.abs(factor)) * jax.lax.rsqrt(jnp.var(z, axis=-1, keepdims=True) + network.eps)
    reach = [last]
    for matrix in reversed(weights.matrices[1:]):
        reach.append(reach[-1] * STEEPEST * _norm(matrix))
    return jnp.concatenate(list(reversed(reach)), axis=-1)


def _norm(matrix: Float[Array, "i o"]) -> Array:
    """An estimate of the largest singular value, by iteration from a fixed vector."""
    at = jax.lax.stop_gradient(matrix)
    v = jnp.ones((1, matrix.shape[1]), matrix.dtype)
    unit = lambda x: x * jax.lax.rsqrt(jnp.sum(x**2) + 1e-30)
    for _ in range(POWERS):
        u = unit(product(unit(v), at.T))
        v = product(u, at)
    return jnp.abs(jnp.sum(product(u, matrix) * unit(v)))
