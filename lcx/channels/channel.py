"""The contract of a channel mixer: `channel(x[B,T,M], tokens[B,T]) -> (y, aux)`, one token at a time."""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from lcx.linear import linear
from lcx.mixers.mixer import Inherited
from lcx.spec import Spec

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": jax.nn.gelu}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channel(Spec, abc.ABC):
    """Base of every channel mixer. matrices: of the projections that LoRA may be added to."""

    matrices: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def build(self, inherited: Inherited, *, rngs: nnx.Rngs) -> nnx.Module:
        """The module with its parameters."""


def projected(module: nnx.Module, x: Float[Array, "B T ..."], name: str) -> Float[Array, "B T ..."]:
    """x by a channel module's matrix of that name, with its LoRA and its bias where it has them."""
    inherited, bias = module.inherited, getattr(module, f"{name}_bias")
    y = linear(x, getattr(module, name), inherited.rules, gradient_sum=inherited.gradient_sum)
    if module.lora is not None and name in module.lora:
        y = y + module.lora[name](x)
    return y if bias is None else y + bias[...].astype(x.dtype)
