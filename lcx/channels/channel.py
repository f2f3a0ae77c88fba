"""The contract of a channel mixer: `channel(x[B,T,M], tokens[B,T]) -> (y, aux)`, one token at a time."""

import abc
import dataclasses

from flax import nnx

from lcx.mixers.mixer import Inherited
from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channel(Spec, abc.ABC):
    """Base of every channel mixer."""

    @abc.abstractmethod
    def build(self, inherited: Inherited, *, rngs: nnx.Rngs) -> nnx.Module:
        """The module with its parameters."""
