"""Residual forms: how a layer's mixer, channel and norms are joined to the stream."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

from jaxtyping import Array

from lcx.spec import Spec

Step = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual(Spec, abc.ABC):
    """Base of every residual form. `norms` is how many a layer owns; `gain` scales its initial weights."""

    norms: ClassVar[int]
    gain: float = 1.0

    def validate(self):
        self.check(self.gain > 0, "gain", "a positive number")

    @abc.abstractmethod
    def join(self, x: Array, mixer: Step, channel: Step, norms: Sequence[Step]) -> Array:
        """The layer's output for its input `x[B,T,M]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreNorm(Residual):
    """x + mixer(norm x), then x + channel(norm x) (GPT-2, 2019; Llama)."""

    norms = 2

    def join(self, x, mixer, channel, norms):
        x = x + mixer(norms[0](x))
        return x + channel(norms[1](x))

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandwich(Residual):
    """A norm before and after each part: x + norm(mixer(norm x)) (CogView, 2021; Gemma 2)."""

    norms = 4

    def join(self, x, mixer, channel, norms):
        x = x + norms[1](mixer(norms[0](x)))
        return x + norms[3](channel(norms[2](x)))

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Residual):
    """Both parts read one norm: x + mixer(norm x) + channel(norm x) (GPT-J, 2021; PaLM)."""

    norms = 1

    def join(self, x, mixer, channel, norms):
        y = norms[0](x)
        return x + mixer(y) + channel(y)

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepNorm(Residual):
    """norm(alpha x + mixer(x)) (Wang et al. 2022). For a decoder of N layers: alpha = (2N) ** 0.25, gain = (8N) ** -0.25.

    alpha = 1 and gain = 1 is the post-norm of the first Transformer. Set `final_norm` of the decoder to taste: the stream
    is already normalised.
    """

    norms = 2
    alpha: float

    def validate(self):
        super().validate()
        self.check(self.alpha > 0, "alpha", "a positive number")

    def join(self, x, mixer, channel, norms):
        x = norms[0](self.alpha * x + mixer(x))
        return norms[1](self.alpha * x + channel(x))

    @classmethod
    def examples(cls):
        return (cls(alpha=1.41, gain=0.5),)
