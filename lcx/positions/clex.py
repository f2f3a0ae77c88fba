"""CLEX (Chen et al. 2024, Continuous Length Extrapolation): frequencies that follow a learned equation in the length.

For a document of n tokens, t = ceil(n / L) with L the trained window, at most `largest`. The logarithm z of a frequency obeys
    dz/dt = W_down act(W_up (z + ln theta_ntk(t))) + d/dt ln theta_ntk(t),   z(1) = ln theta
    theta_ntk(t)_c = (base a^(r / (r - 2)))^(-2c / r),   a = 2t - 1
solved by Runge and Kutta's method in `steps` steps a unit of t. W_down begins at 0, where the solution is theta_ntk itself: so
what is integrated is the difference y = z - ln theta_ntk, and the untrained rope is NTK to the last bit.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from lcx.positions.frequencies import Frequencies, geometric
from lcx.positions.length_rule import LengthRule

ACTIVATIONS = {"tanh": jnp.tanh, "silu": jax.nn.silu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLEX(LengthRule):
    """The rope of a model, with parameters of its own, for all layers. expansion: hidden size as a multiple of the channels.

    Train with `CLEXPositions`, which says with every document which t its positions are for.
    """

    largest: int = 16
    expansion: float = 1.0
    activation: Literal["tanh", "silu"] = "tanh"
    steps: int = 100

    learned = True

    def validate(self):
        super().validate()
        self.check(self.largest >= 1, "largest", "at least 1")
        self.check(self.expansion > 0, "expansion", "a positive number")
        self.check(self.steps >= 1, "steps", "at least 1 a unit of length")

    @property
    def spacing(self):
        return self.original_length

    @property
    def rows(self):
        return self.largest

    def inverse_frequencies(self, rotary_dim, length):
        """Before training."""
        self.check(rotary_dim > 2, "rotary", f"more than the {rotary_dim} rotated channels: the exponent is r / (r - 2)")
        growth = 2 * min(max(1, math.ceil(length / self.original_length)), self.largest) - 1
        return geometric(self.base * growth ** (rotary_dim / (rotary_dim - 2)), rotary_dim)

    def build(self, head_dim: int, *, rngs: nnx.Rngs) -> "CLEXModule":
        """The rope of heads of so many channels with its parameters."""
        return CLEXModule(self, head_dim, rngs)

    @classmethod
    def examples(cls):
        return (cls(original_length=4, largest=4, steps=4),)


class CLEXModule(nnx.Module):
    def __init__(self, spec: CLEX, head_dim: int, rngs: nnx.Rngs):
        self.spec, self.head_dim = spec, head_dim
        pairs = spec.rotated(head_dim) // 2
        hidden = max(1, int(2 * pairs * spec.expansion))
        bound = 1 / math.sqrt(pairs)  # Kaiming's uniform with a = sqrt(5)
        self.up = nnx.Param(
            jax.random.uniform(rngs.params(), (pairs, hidden), minval=-bound, maxval=bound), axes=(None, None), added=True
        )
        self.down = nnx.Param(jnp.zeros((hidden, pairs)), axes=(None, None), added=True)

    def settled(self) -> "Settled":
        """The same, solved once and for all: for models that are used, not trained."""
        return Settled(self())

    def __call__(self) -> Frequencies:
        """A row of frequencies for each t, traced."""
        spec = self.spec
        untrained = spec.frequencies(self.head_dim, spec.largest * spec.original_length)
        return dataclasses.replace(untrained, inv_freq=jnp.asarray(untrained.inv_freq, jnp.float32) * jnp.exp(self._moved()))

    def _moved(self) -> Float[Array, "N C"]:
        """y at t = 1, 2, ...: what training has added to the logarithms."""
        spec, up, down = self.spec, self.up[...], self.down[...]
        width = 1 / spec.steps
        rotary_dim = 2 * up.shape[0]
        start = np.log(geometric(spec.base, rotary_dim))
        slope = -np.arange(0, rotary_dim, 2) / max(1, rotary_dim - 2)
        act = ACTIVATIONS[spec.activation]
        product = lambda x, matrix: jnp.dot(x, matrix, precision="highest")

        def rate(t, y):
            ntk = jnp.asarray(start, jnp.float32) + jnp.asarray(slope, jnp.float32) * jnp.log(2 * t - 1)
            return product(act(product(y + 2 * ntk, up)), down)

        @jax.checkpoint
        def unit(y, t):
            def step(y, n):
                now = t + n * width
                k1 = rate(now, y)
                k2 = rate(now + width / 2, y + width / 2 * k1)
                k3 = rate(now + width / 2, y + width / 2 * k2)
                k4 = rate(now + width, y + width * k3)
                return y + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

            y, _ = jax.lax.scan(step, y, jnp.arange(spec.steps, dtype=jnp.float32))
            return y, y

        nothing = jnp.zeros(up.shape[0])
        _, later = jax.lax.scan(unit, nothing, jnp.arange(1, spec.largest, dtype=jnp.float32))
        return jnp.concatenate([nothing[None], later])


class Settled(nnx.Module):
    """A learned rope whose frequencies are known."""

    def __init__(self, frequencies: Frequencies):
        self.others = dataclasses.replace(frequencies, inv_freq=np.zeros(frequencies.inv_freq.shape))
        self.inv_freq = nnx.Variable(frequencies.inv_freq)

    def __call__(self) -> Frequencies:
        return dataclasses.replace(self.others, inv_freq=self.inv_freq[...])
