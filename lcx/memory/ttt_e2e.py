"""TTT-E2E (End-to-end test-time training for long context, 2025): a model that trains itself on what it reads.

The last layers have one more gated MLP, behind attention, whose matrices W are the memory. A document is read in chunks; L_n is
the mean loss of the next tokens of a chunk at the weights that the chunks before it left, and behind it they take one step:

    g = dL_n / dW(n-1),   W(n) = W(n-1) - rate min(1, clip / |g|) g,   |g| over the matrices of all layers, of one document

All next tokens of the document count, whatever an objective weighs. W(0) is learned, by the loss of all tokens, each before its
own step: the gradient goes through the steps, and through the keys and values that a chunk leaves to attention of the next,
which are inputs of its L_n.

The published training raises the rate over its first steps, which a model does not know of: here `rate` is what it is.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcx.linear import wide_product
from lcx.memory.model_memory import ModelMemory, added
from lcx.mixers.mixer import Inherited, residual_gain, weight
from lcx.norms import Norm
from lcx.parallel.rules import shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class TTTE2E(ModelMemory):
    """chunk: tokens of a step. suffix: how many of the last layers have fast weights. hidden: the inner width of their MLPs.
    rate: of a step, 0 for weights that stay as learned. clip: the largest norm of a gradient, None for any. first_order:
    training takes a step's gradient as given. bptt: training's gradients go through groups of so many chunks, counted from a
    row's start, and not from one to the one before; None is all of a row."""

    chunk: int
    suffix: int
    hidden: int
    rate: float = 1.0
    clip: float | None = 1.0
    first_order: bool = False
    bptt: int | None = None
    chunked = True

    def validate(self):
        for field in ("chunk", "suffix", "hidden"):
            self.check(getattr(self, field) >= 1, field, "at least 1")
        self.check(self.rate >= 0, "rate", "0 or a positive number")
        self.check(self.clip is None or self.clip > 0, "clip", "a positive norm, or None")
        self.check(self.bptt is None or self.bptt >= 1, "bptt", "at least 1 chunk, or None")

    @classmethod
    def examples(cls):
        return (
            cls(chunk=4, suffix=1, hidden=8),
            cls(chunk=4, suffix=1, hidden=8, first_order=True, clip=None, rate=0.5),
            cls(chunk=3, suffix=1, hidden=8, bptt=2),
        )


class Fast(NamedTuple):
    """The matrices of each row, of all periods of layers."""

    gate: Float[Array, "*L B M F"]
    up: Float[Array, "*L B M F"]
    down: Float[Array, "*L B F M"]


class PrimeModule(nnx.Module):
    """SwiGLU with matrices of each row's own: (silu(x W_gate) * x W_up) W_down. Its parameters are those at a document's start,
    and norms."""

    def __init__(self, hidden: int, norm: Norm, norms: int, inherited: Inherited, rngs: nnx.Rngs):
        self.inherited = inherited
        M, F = inherited.width, hidden
        make = lambda shape, axes, gain: added(weight(rngs, shape, axes, fan_in=shape[0], gain=gain)[...], axes)
        self.gate = make((M, F), ("width", "hidden"), inherited.gain)
        self.up = make((M, F), ("width", "hidden"), inherited.gain)
        self.down = make((F, M), ("hidden", "width"), residual_gain(inherited))
        self.norms = nnx.List([norm.build(M) for _ in range(norms)])
        for leaf in jax.tree.leaves(nnx.state(self.norms), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            leaf.set_metadata(added=True)

    def start(self, rows: int) -> Fast:
        """The matrices at the start of documents."""
        each = lambda matrix: jnp.broadcast_to(matrix[...], (rows, *matrix.shape))
        return self._placed(Fast(each(self.gate), each(self.up), each(self.down)))

    def __call__(self, x: Float[Array, "B T M"], fast: Fast) -> Float[Array, "B T M"]:
        """Products are of the model's precision and give float32, and so do their gradients."""
        rules, fast = self.inherited.rules, self._placed(fast)
        product = jax.vmap(lambda x, matrix: wide_product(x, matrix, self.inherited.compute))
        inner = shard(jax.nn.silu(product(x, fast.gate)) * product(x, fast.up), rules, "batch", None, "hidden")
        return shard(product(inner, fast.down).astype(x.dtype), rules, "batch", None, None)

    def _placed(self, fast: Fast) -> Fast:
        rules = self.inherited.rules
        wide = lambda matrix: shard(matrix, rules, "batch", None, "hidden")
        return Fast(wide(fast.gate), wide(fast.up), shard(fast.down, rules, "batch", "hidden", None))


def stepped(spec: TTTE2E, fast: tuple[Fast, ...], gradient: tuple[Fast, ...]) -> tuple[Fast, ...]:
    """The weights behind a step of each row; leaves [L, B, ...]."""
    share = jnp.float32(spec.rate)
    if spec.clip is not None:
        squares = sum(jnp.square(leaf).sum(axis=(0, 2, 3)) for leaf in jax.tree.leaves(gradient))
        over = squares > spec.clip**2
        share = share * jnp.where(over, spec.clip * jax.lax.rsqrt(jnp.where(over, squares, 1)), 1)[:, None, None]
    return jax.tree.map(lambda w, g: w - share * g, fast, gradient)
