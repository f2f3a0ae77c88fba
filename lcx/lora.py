"""LoRA (Hu et al. 2021): a product of two thin matrices beside a projection, y = x W + scale / rank dropout(x) down up."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lcx.linear import linear
from lcx.parallel.gathered import logical_axes
from lcx.parallel.rules import Rules
from lcx.spec import Spec

Projection = Literal["query", "key", "value", "output", "gate", "up", "down"]
OF_ATTENTION = ("query", "key", "value", "output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Spec):
    """rank: of the product. projections: which have one. scale: of it, the paper's alpha. dropout: the share of x's channels
    that training leaves out, of each token anew."""

    rank: int
    projections: tuple[Projection, ...] = ("query", "value")
    scale: float = 1.0
    dropout: float = 0.0

    def validate(self):
        self.check(self.rank >= 1, "rank", "at least 1")
        self.check(len(set(self.projections)) == len(self.projections) >= 1, "projections", "distinct ones, at least one")
        self.check(self.scale > 0, "scale", "a positive number")
        self.check(0 <= self.dropout < 1, "dropout", "a share in [0, 1)")


class LoRAPair(nnx.Module):
    """What is added to one projection; begins as nothing. `key`: of its dropout, None outside of training."""

    def __init__(self, spec: LoRA, base: nnx.Param, inputs: int, rules: Rules, rngs: nnx.Rngs):
        self.spec, self.rules, self.inputs = spec, rules, inputs
        axes, size = logical_axes(base, base.ndim), math.prod(base.shape[:inputs])
        drawn = jax.random.normal(rngs.params(), (*base.shape[:inputs], spec.rank)) / math.sqrt(size)
        self.down = nnx.Param(drawn, axes=(*axes[:inputs], None), added=True)
        self.up = nnx.Param(jnp.zeros((spec.rank, *base.shape[inputs:])), axes=(None, *axes[inputs:]), added=True)
        self.key = None

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        if self.key is not None:
            kept = jax.random.bernoulli(jax.random.wrap_key_data(self.key), 1 - self.spec.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.spec.dropout), 0)
        thin = linear(x, self.down, self.rules, contracted=self.inputs)
        return linear(thin, self.up, self.rules) * (self.spec.scale / self.spec.rank)


def lora_pairs(spec: LoRA | None, bases: dict[str, nnx.Param], rules: Rules, rngs: nnx.Rngs) -> nnx.Dict | None:
    """Those of a module's projections, by name; None where it has none."""
    chosen = {} if spec is None else {name: base for name, base in bases.items() if name in spec.projections}
    if not chosen:
        return None
    inputs = {"output": 2}
    return nnx.Dict({name: LoRAPair(spec, base, inputs.get(name, 1), rules, rngs) for name, base in chosen.items()})


def with_dropout(model: nnx.Module, key: Key[Array, ""]) -> nnx.Module:
    """A copy of a decoder whose additions leave out channels as the key says, each layer and projection others."""
    model = nnx.merge(*nnx.split(model))
    for slot, block in enumerate(model.slots):
        for part, module in enumerate((block.mixer, block.channel)):
            for n, name in enumerate(getattr(module, "lora", None) or ()):
                own = jax.random.fold_in(key, (slot * 2 + part) * 8 + n)
                module.lora[name].key = nnx.data(jax.random.key_data(jax.random.split(own, model.spec.periods)))
    return model
