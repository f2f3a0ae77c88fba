"""Gated linear unit: y = (act(x W_gate) * x W_up) W_down. SwiGLU with `silu`, GeGLU with `gelu` (Shazeer 2020)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.channels.channel import ACTIVATIONS, Activation, Channel, projected
from lcx.lora import lora_pairs
from lcx.mixers.mixer import Inherited, residual_gain, weight
from lcx.parallel.rules import shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLU(Channel):
    """hidden: the inner width."""

    matrices = ("gate", "up", "down")

    hidden: int
    activation: Activation = "silu"
    bias: bool = False

    def validate(self):
        self.check(self.hidden >= 1, "hidden", "at least 1")

    def build(self, inherited, *, rngs):
        return GLUModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (cls(hidden=24), cls(hidden=16, activation="gelu", bias=True))


class GLUModule(nnx.Module):
    CAST = ("gate", "up", "down")

    def __init__(self, spec: GLU, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        M, F = inherited.width, spec.hidden
        self.gate = weight(rngs, (M, F), ("width", "hidden"), fan_in=M, gain=inherited.gain)
        self.up = weight(rngs, (M, F), ("width", "hidden"), fan_in=M, gain=inherited.gain)
        self.down = weight(rngs, (F, M), ("hidden", "width"), fan_in=F, gain=residual_gain(inherited))
        self.lora = lora_pairs(inherited.lora, {name: getattr(self, name) for name in spec.matrices}, inherited.rules, rngs)
        zeros = lambda size, axis: nnx.Param(jnp.zeros((size,)), axes=(axis,)) if spec.bias else None
        self.gate_bias, self.up_bias, self.down_bias = zeros(F, "hidden"), zeros(F, "hidden"), zeros(M, "width")

    def __call__(self, x: Float[Array, "B T M"], tokens: Int[Array, "B T"]):
        rules = self.inherited.rules
        gate, up = projected(self, x, "gate"), projected(self, x, "up")
        inner = shard(ACTIVATIONS[self.spec.activation](gate) * up, rules, "batch", "sequence", "hidden")
        y = projected(self, inner, "down")
        return shard(y, rules, "batch", "sequence", None), {}
