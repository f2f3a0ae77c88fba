"""Multi-layer perceptron of two matrices: y = act(x W_up + b_up) W_down + b_down (Vaswani et al. 2017; GPT-NeoX, 2022)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.channels.channel import ACTIVATIONS, Activation, Channel, projected
from lcx.lora import lora_pairs
from lcx.mixers.mixer import Inherited, residual_gain, weight
from lcx.parallel.rules import shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLP(Channel):
    """hidden: the inner width."""

    matrices = ("up", "down")

    hidden: int
    activation: Activation = "gelu"

    def validate(self):
        self.check(self.hidden >= 1, "hidden", "at least 1")

    def build(self, inherited, *, rngs):
        return MLPModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (cls(hidden=24),)


class MLPModule(nnx.Module):
    CAST = ("up", "down")

    def __init__(self, spec: MLP, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        M, F = inherited.width, spec.hidden
        self.up = weight(rngs, (M, F), ("width", "hidden"), fan_in=M, gain=inherited.gain)
        self.down = weight(rngs, (F, M), ("hidden", "width"), fan_in=F, gain=residual_gain(inherited))
        self.lora = lora_pairs(inherited.lora, {name: getattr(self, name) for name in spec.matrices}, inherited.rules, rngs)
        self.up_bias = nnx.Param(jnp.zeros((F,)), axes=("hidden",))
        self.down_bias = nnx.Param(jnp.zeros((M,)), axes=("width",))

    def __call__(self, x: Float[Array, "B T M"], tokens: Int[Array, "B T"]):
        rules = self.inherited.rules
        inner = ACTIVATIONS[self.spec.activation](projected(self, x, "up"))
        y = projected(self, shard(inner, rules, "batch", "sequence", "hidden"), "down")
        return shard(y, rules, "batch", "sequence", None), {}
