"""Optimizers: specs that build an optax transformation for the parameters of a model.

Parameters fall into named groups by what they are, never by how many axes their array has (stacked norms and biases of
heads have two): embeddings, matrices, norms, biases. A spec says which groups decay.
"""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lcx.spec import Spec
from lcx.training.schedules import Schedule

Group = Literal["matrices", "embeddings", "norms", "biases"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer(Spec, abc.ABC):
    """Base of every optimizer. learning_rate: its schedule, logged at every step."""

    learning_rate: Schedule

    @abc.abstractmethod
    def build(self, state: nnx.State, steps: int) -> optax.GradientTransformation:
        """The transformation of pure-dict gradients for a (possibly abstract) model state and a run of `steps` updates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), moments in float32.

    decay: weight decay, multiplied by the learning rate, of the groups in `decayed`. clip: largest global norm of the
    gradient, or None.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    decay: float = 0.1
    decayed: tuple[Group, ...] = ("matrices",)
    clip: float | None = 1.0

    def validate(self):
        for field in ("beta1", "beta2"):
            self.check(0 <= getattr(self, field) < 1, field, "from 0 up to, not including, 1")
        self.check(self.eps > 0, "eps", "a positive number")
        self.check(self.decay >= 0, "decay", "0 or a positive number")
        self.check(len(set(self.decayed)) == len(self.decayed), "decayed", "distinct groups")
        self.check(self.clip is None or self.clip > 0, "clip", "a positive norm or None")

    def build(self, state, steps):
        mask = jax.tree.map(lambda group: group in self.decayed, groups(state))
        clip = optax.identity() if self.clip is None else optax.clip_by_global_norm(self.clip)
        adam = optax.adamw(
            self.learning_rate.build(steps),
            b1=self.beta1,
            b2=self.beta2,
            eps=self.eps,
            weight_decay=self.decay,
            mask=mask,
            mu_dtype=jnp.float32,
        )
        return optax.chain(clip, adam)

    @classmethod
    def examples(cls):
        from lcx.training.schedules import Constant, Cosine

        every = ("matrices", "embeddings", "norms", "biases")
        return (
            cls(learning_rate=Cosine(peak=1e-2, warmup=1)),
            cls(learning_rate=Constant(peak=1e-2), decayed=every, clip=None),
        )


def groups(state: nnx.State) -> dict[Any, Any]:
    """The group of every parameter, in the shape of `nnx.to_pure_dict(state)`.

    A look-up table, of the vocabulary or of positions, is an embedding, also where the head is tied to it; an untied head is a
    matrix. Short vectors that are neither norms nor named biases (a learned sink, a gate a head) count as biases.
    """
    found = nnx.map_state(lambda path, leaf: leaf.replace(group_of(path, leaf.get_metadata().get("axes"), leaf.ndim)), state)
    return nnx.to_pure_dict(found)


def group_of(path: tuple[Any, ...], axes: tuple[str | None, ...] | None, rank: int) -> Group:
    """The group of one parameter by its path in the model and its logical axes."""
    names = [str(part) for part in path]
    own = [axis for axis in axes if axis != "layers"] if axes is not None else [None] * rank
    if any(name.endswith("bias") for name in names):
        return "biases"
    if any("norm" in name or name.endswith("gain") for name in names):
        return "norms"
    if (own and own[0] == "vocab") or names[0] == "position_table":
        return "embeddings"
    return "matrices" if len(own) >= 2 else "biases"
