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
class InParts(Residual, abc.ABC):
    """Forms that add the mixer and then the channel in the same way, each with half of the norms."""

    @abc.abstractmethod
    def add(self, x: Array, step: Step, norms: Sequence[Step]) -> Array:
        """The stream `x[B,T,M]` with what one part gives."""

    def join(self, x, mixer, channel, norms):
        half = self.norms // 2
        x = self.add(x, mixer, norms[:half])
        return self.add(x, channel, norms[half:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreNorm(InParts):
    """x + mixer(norm x), then x + channel(norm x) (GPT-2, 2019; Llama)."""

    norms = 2

    def add(self, x, step, norms):
        return x + step(norms[0](x))

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandwich(InParts):
    """A norm before and after each part: x + norm(mixer(norm x)) (CogView, 2021; Gemma 2)."""

    norms = 4

    def add(self, x, step, norms):
        return x + norms[1](step(norms[0](x)))

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
class ParallelTwoNorms(Residual):
    """Both parts read the stream, each through a norm of its own (GPT-NeoX, 2022)."""

    norms = 2

    def join(self, x, mixer, channel, norms):
        return x + mixer(norms[0](x)) + channel(norms[1](x))

    @classmethod
    def examples(cls):
        return (cls(),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepNorm(InParts):
    """norm(alpha x + mixer(x)) (Wang et al. 2022). For a decoder of N layers: alpha = (2N) ** 0.25, gain = (8N) ** -0.25.

    alpha = 1 and gain = 1 is the post-norm of the first Transformer. Set `final_norm` of the decoder to taste: the stream
    is already normalised.
    """

    norms = 2
    alpha: float

    def validate(self):
        super().validate()
        self.check(self.alpha > 0, "alpha", "a positive number")

    def add(self, x, step, norms):
        return norms[0](self.alpha * x + step(x))

    @classmethod
    def examples(cls):
        return (cls(alpha=1.41, gain=0.5),)
