"""The contract of a channel mixer: `channel(x[B,T,M], tokens[B,T]) -> (y, aux)`, one token at a time."""

import abc
import dataclasses
from typing import ClassVar, Literal

import jax
from flax import nnx

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
