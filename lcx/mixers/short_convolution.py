"""Short causal convolution: y_t = sum over k = 1..taps of W_k * x_{t-k}, one weight a channel, within a document.

Supplies the previous-token features that plain attention needs thousands of steps to find (Mamba, 2023; H3, 2022). The
current token is left out: the part is added to a residual stream that already carries it.

It reads array neighbours, so without a state padding may stand before, between and behind documents; padding or another
document inside one gives NaN from there to the row's end, not an answer with taps missing. In chunks fed with a state padding
may stand anywhere.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.batch import PADDING, Batch, TokenInfo
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place
from lcx.mixers.neighbours import torn
from lcx.record import record


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShortConvolution(Mixer):
    """taps: how many earlier tokens are read."""

    taps: int = 4
    sequential = True

    def validate(self):
        self.check(self.taps >= 1, "taps", "at least 1")

    def build(self, inherited, *, rngs):
        return ShortConvolutionModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        return (cls(), cls(taps=1))


@record
class ConvolutionState:
    """The last `taps` tokens of each row that were not padding; segment 0 where there are fewer."""

    x: Float[Array, "B taps M"]
    index: Int[Array, "B taps"]
    segments: Int[Array, "B taps"]


class ShortConvolutionModule(MixerModule):
    def __init__(self, spec: ShortConvolution, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.inherited = spec, inherited
        shape = (spec.taps, inherited.width)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) / jnp.sqrt(spec.taps), axes=(None, "width"))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        y, after = convolved(x, batch.info, state, self.kernel[...], nearest=1)
        return y if state is not None else jnp.where(torn(batch.info)[..., None], jnp.nan, y), after, {}

    def init_state(self, batch_size, length):
        return empty_convolution(batch_size, self.spec.taps, self.inherited.width, self.inherited.compute)


def convolved(
    x: Float[Array, "B T M"],
    info: TokenInfo,
    state: ConvolutionState | None,
    kernel: Float[Array, "taps M"],
    *,
    nearest: int,
) -> tuple[Float[Array, "B T M"], ConvolutionState | None]:
    """sum over n of kernel[n] * x_{t - nearest - n}, and the state behind the chunk; `nearest` 0 begins with the token itself.

    A state holds the last `taps + nearest - 1` tokens. Without one, what is `torn` lacks taps.
    """
    index, segments = info.index, info.segments
    if state is None:
        return _convolve(x, index, segments, kernel, nearest), None
    taps = state.index.shape[1]
    x = jnp.concatenate([state.x.astype(x.dtype), x], axis=1)
    index = jnp.concatenate([state.index, index], axis=1)
    segments = jnp.concatenate([state.segments, segments], axis=1)
    # Padding is moved to the front, so that the tokens before and after it are neighbours.
    order = jnp.argsort(segments != PADDING, axis=1, stable=True)
    take = lambda field: jnp.take_along_axis(field, order.reshape(order.shape + (1,) * (field.ndim - 2)), axis=1)
    x, index, segments = take(x), take(index), take(segments)
    y = _convolve(x, index, segments, kernel, nearest)
    back = jnp.argsort(order, axis=1)[:, taps:]
    last = lambda field: field[:, field.shape[1] - taps :]
    state = ConvolutionState(x=last(x).astype(state.x.dtype), index=last(index), segments=last(segments))
    return jnp.take_along_axis(y, back[..., None], axis=1), state


def convolved_heads(
    y: Float[Array, "B T H D"], info: TokenInfo, state: ConvolutionState | None, kernel: Float[Array, "taps H D"]
) -> tuple[Float[Array, "B T H D"], ConvolutionState | None]:
    """The same of a projection to heads, the token itself included."""
    flat = y.reshape(*y.shape[:2], -1)
    found, state = convolved(flat, info, state, kernel.reshape(len(kernel), -1), nearest=0)
    return found.reshape(y.shape), state


def empty_convolution(batch_size: int, taps: int, width: int, dtype: str) -> ConvolutionState:
    """The state before any token, of the last `taps`."""
    empty = jnp.zeros((batch_size, taps), jnp.int32)
    return ConvolutionState(x=jnp.zeros((*empty.shape, width), dtype), index=empty, segments=empty)


def _convolve(x, index, segments, kernel, nearest):
    """A tap counts where the token k places before in the array is the token k places before in the document."""
    kernel, y = kernel.astype(x.dtype), jnp.zeros_like(x)
    for n in range(len(kernel)):
        k = n + nearest
        before = lambda field, k=k: jnp.pad(field, ((0, 0), (k, 0)) + ((0, 0),) * (field.ndim - 2))[:, : field.shape[1]]
        linked = (before(segments) == segments) & (segments != PADDING) & (before(index) == index - k)
        y = y + jnp.where(linked[..., None], before(x), 0) * kernel[n]
    return y
