"""Normalisations. Statistics are float32 whatever the compute dtype."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.spec import Spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm(Spec, abc.ABC):
    """Base of every norm: `build(size)` gives a module from [..., size] to [..., size]."""

    eps: float = 1e-6

    def validate(self):
        self.check(self.eps > 0, "eps", "a positive number")

    @abc.abstractmethod
    def build(self, size: int, *, axis: str | None = None) -> nnx.Module:
        """A norm over the last axis; `axis` is its logical name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """x / rms(x) * (weight + offset), Zhang and Sennrich 2019. Gemma stores the weight less 1: offset = 1."""

    offset: float = 0.0

    def build(self, size, *, axis=None):
        return RMSNormModule(self, size, axis)

    @classmethod
    def examples(cls):
        return (cls(), cls(offset=1.0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm(Norm):
    """(x - mean) / std * weight + bias, Ba et al. 2016."""

    def build(self, size, *, axis=None):
        return LayerNormModule(self, size, axis)

    @classmethod
    def examples(cls):
        return (cls(),)


class RMSNormModule(nnx.Module):
    def __init__(self, spec: RMSNorm, size: int, axis: str | None):
        self.spec = spec
        self.weight = nnx.Param(jnp.full((size,), 1.0 - spec.offset), axes=(axis,))

    def __call__(self, x: Float[Array, "*n M"]) -> Float[Array, "*n M"]:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.spec.eps)
        return (wide * scale * (self.weight[...].astype(jnp.float32) + self.spec.offset)).astype(x.dtype)


class LayerNormModule(nnx.Module):
    def __init__(self, spec: LayerNorm, size: int, axis: str | None):
        self.spec = spec
        self.weight = nnx.Param(jnp.ones((size,)), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((size,)), axes=(axis,))

    def __call__(self, x: Float[Array, "*n M"]) -> Float[Array, "*n M"]:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.spec.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)
