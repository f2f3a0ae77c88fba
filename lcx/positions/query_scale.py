"""Query scales: logits of a query grow with its place. A factor on the query, the same for all heads."""

import abc
import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryScale(Spec, abc.ABC):
    """Base of every scale."""

    @abc.abstractmethod
    def scale(self, index: Int[Array, "B T"]) -> Float[Array, "B T"]:
        """The float32 factor of a query at each place of its document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogN(QueryScale):
    """max(1, ln(i + 1) / ln L) with L the trained window (Su 2023; Entropy-ABF, Zhang et al. 2024): as many keys more to choose
    among, as much sharper."""

    original_length: int

    def validate(self):
        self.check(self.original_length >= 2, "original_length", "at least 2 tokens")

    def scale(self, index):
        return jnp.maximum(1.0, jnp.log1p(index.astype(jnp.float32)) / math.log(self.original_length))

    @classmethod
    def examples(cls):
        return (cls(original_length=6),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepped(QueryScale):
    """1 + strength ln(1 + floor((i + 1) / every)): Llama 4 (2025), on its layers without rotation."""

    every: int = 8192
    strength: float = 0.1

    def validate(self):
        self.check(self.every >= 1, "every", "at least 1 token")
        self.check(self.strength >= 0, "strength", "at least 0")

    def scale(self, index):
        return 1 + self.strength * jnp.log1p(((index + 1) // self.every).astype(jnp.float32))

    @classmethod
    def examples(cls):
        return (cls(every=4, strength=0.5),)
