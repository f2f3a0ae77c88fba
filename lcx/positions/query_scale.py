"""Query scales: logits of a query grow with its place. A factor on the query, the same for all heads."""

import abc
import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryScale(Spec, abc.ABC):
    """Base of every scale."""

    reads_lengths: ClassVar[bool] = False  # whether it depends on how long a document is

    @abc.abstractmethod
    def scale(
        self, index: Int[Array, "B T"], layer: Int[Array, ""] | None = None, lengths: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T"]:
        """The float32 factor of a query at each place of its document; layer: of the model's, from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogN(QueryScale):
    """max(1, ln(i + 1) / ln L) with L the trained window (Su 2023; Entropy-ABF, Zhang et al. 2024): as many keys more to choose
    among, as much sharper. The first `skip_layers` layers keep theirs: in Entropy-ABF two, where the entropy
    of the authors' models grows with the length; `lcx.evaluation.attention_entropy` measures it."""

    original_length: int
    skip_layers: int = 0

    def validate(self):
        self.check(self.original_length >= 2, "original_length", "at least 2 tokens")
        self.check(self.skip_layers >= 0, "skip_layers", "at least 0")

    def scale(self, index, layer=None, lengths=None):
        factor = jnp.maximum(1.0, jnp.log1p(index.astype(jnp.float32)) / math.log(self.original_length))
        if self.skip_layers == 0:
            return factor
        if layer is None:
            raise ValueError(f"LogN.skip_layers = {self.skip_layers}: expected 0 outside the layers of a model")
        return jnp.where(layer < self.skip_layers, 1.0, factor)

    @classmethod
    def examples(cls):
        return (cls(original_length=6), cls(original_length=6, skip_layers=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLength(QueryScale):
    """ln n / ln L for all queries of a document of n tokens. least: `one` leaves documents within the window as they are
    (LongEmbed, Zhu et al. 2024), `none` softens them (CLEX, Chen et al. 2024). length_policy: as a rope's."""

    original_length: int
    least: Literal["one", "none"] = "one"
    length_policy: Literal["frozen", "growing"] = "frozen"

    reads_lengths = True

    def validate(self):
        self.check(self.original_length >= 2, "original_length", "at least 2 tokens")

    def scale(self, index, layer=None, lengths=None):
        if lengths is None:
            raise ValueError(
                "info.lengths: None, but this query scale depends on the length of a document: expected one a token"
            )
        factor = jnp.log(jnp.maximum(lengths, 1).astype(jnp.float32)) / math.log(self.original_length)
        return jnp.maximum(1.0, factor) if self.least == "one" else factor

    @classmethod
    def examples(cls):
        return (cls(original_length=6), cls(original_length=6, least="none"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepped(QueryScale):
    """1 + strength ln(1 + floor((i + 1) / every)): Llama 4 (2025), on its layers without rotation."""

    every: int = 8192
    strength: float = 0.1

    def validate(self):
        self.check(self.every >= 1, "every", "at least 1 token")
        self.check(self.strength >= 0, "strength", "at least 0")

    def scale(self, index, layer=None, lengths=None):
        return 1 + self.strength * jnp.log1p(((index + 1) // self.every).astype(jnp.float32))

    @classmethod
    def examples(cls):
        return (cls(every=4, strength=0.5),)
