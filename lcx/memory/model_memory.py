"""The base of what `Decoder.memory` takes: memories that the whole model has, beside those of its mixers."""

import abc
import dataclasses
from typing import ClassVar

from flax import nnx
from jaxtyping import Array

from lcx.attention.mask import Mask
from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelMemory(Spec, abc.ABC):
    """`sequential`, `recurrent`, `chunked`: as of `Mixer`. hides: what attention lets through, beside its own mask; None is
    all."""

    sequential: ClassVar[bool] = True
    recurrent: ClassVar[bool] = True
    chunked: ClassVar[bool] = False

    @property
    def hides(self) -> Mask | None:
        return None


def added(value: Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter that a trained decoder lacks."""
    return nnx.Param(value, axes=axes, added=True)
