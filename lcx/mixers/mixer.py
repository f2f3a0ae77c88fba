"""The contract of a token mixer: `mixer(x[B,T,M], batch, state=None, *, place=Place()) -> (y, state, aux)`.

Parallel form = chunked form = step form; packed equals separate; padding changes nothing; perturbing token t leaves every
output before t unchanged. With a state, `batch` is the next chunk and padding tokens consume nothing of it; a segment is one
document's, and none that comes later has the same.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.attention.all_gather import AllGather
from lcx.attention.communication import Communication
from lcx.attention.mask import Mask
from lcx.batch import Batch
from lcx.linear import GradientSum
from lcx.lora import LoRA
from lcx.memory.activation_beacon import ActivationBeacon
from lcx.parallel.rules import Rules
from lcx.positions.frequencies import Frequencies, FrequencyRule
from lcx.spec import Spec

Compute = Literal["float32", "bfloat16"]
Aux = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inherited:
    """What a part takes over from its model. gain scales the initial weights that write to the residual stream.

    channel_chunk: tokens of a row of a device that channel mixers see at a time; None is all. gradient_sum: of `linear`.
    documents: the most that a row holds, which mixers that count chunks from a document's start make room for. beacons: those
    of which attention keeps keys and values. hides: what attention lets through, beside its own mask. lora: what is added to
    projections.
    """

    width: int
    depth: int
    rope: FrequencyRule | None
    compute: Compute
    rules: Rules
    communication: Communication = AllGather()
    gain: float = 1.0
    channel_chunk: int | None = None
    gradient_sum: GradientSum = "compute"
    documents: int = 1
    beacons: ActivationBeacon | None = None
    hides: Mask | None = None
    lora: LoRA | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Where in a model a mixer is called. layer: which of the layers it is in, from 0; None outside of them. frequencies: of
    the model's rope, if that is learned. number, above: the layer as a number, and the states of those before it after this
    pass, where layers are called one by one."""

    layer: Int[Array, ""] | None = None
    frequencies: Frequencies | None = None
    number: int | None = None
    above: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer(Spec, abc.ABC):
    """Base of every token mixer. `sequential`: reads array neighbours, so the layout must keep their order. `recurrent`: knows
    the past by a state that every document begins empty, and so nothing of tokens that all documents see. `chunked`: counts
    chunks from the start of a document, with room for as many documents a row as the model says. `by_index`: takes places
    of tokens from their index, so that positions have to be it."""

    sequential: ClassVar[bool] = False
    recurrent: ClassVar[bool] = False
    chunked: ClassVar[bool] = False
    by_index: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, inherited: Inherited, *, rngs: nnx.Rngs) -> "MixerModule":
        """The module with its parameters. Raises SpecError if the spec does not fit the model."""


class MixerModule(nnx.Module):
    """Base of every mixer with its parameters."""

    def __call__(
        self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()
    ) -> tuple[Array, Any, Aux]:
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def init_state(self, batch_size: int, length: int) -> Any:
        """The empty state for `length` tokens a row."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state")


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], *, fan_in: int, gain: float = 1.0
) -> nnx.Param:
    """A float32 matrix, normal with standard deviation gain / sqrt(fan_in), with its logical axes."""
    return nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32) * (gain / math.sqrt(fan_in)), axes=axes)


def residual_gain(inherited: Inherited) -> float:
    """Gain of a matrix that writes to the residual stream: two writers a layer keep its variance near 1 (GPT-2, 2019)."""
    return inherited.gain / math.sqrt(2 * inherited.depth)
