"""Tile attention as one differentiable op over any of its forms, and what a form of attention has to offer.

A `Fold` is attention of queries to some of their keys as a pair of functions. `backward` is given the statistics of the whole
softmax, of which its keys may be a part, so gradients of parts add up: a ring over devices, a split of the keys and a cache in
two pieces are folds too, made of smaller ones.
    delta = sum(d_out out) - d_lse,   p = exp(s - lse),   ds = p (v d_out^T - delta)
Only q, k, v, out and lse are kept for the backward pass.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.tile_attention import gpu, reference, tpu, xla
from pallas_kernels.tile_attention.blocks import Blocks
from pallas_kernels.tile_attention.decay import Decay
from pallas_kernels.tile_attention.tokens import Bias, Mask, Tokens

FORMS = {"reference": reference, "xla": xla, "tpu": tpu, "gpu": gpu}
LISTED = {  # the forms that take a list of tiles, and their sizes of one of (query, key) tokens
    "xla": lambda bq, bk: {"sizes": xla.Sizes(bq, bk, 1)},
    "tpu": lambda bq, bk: {"blocks": Blocks.same(bq, bk)},
    "gpu": lambda bq, bk: {"tile": (bq, bk)},
}
SAVED = "attention"  # the checkpoint name of (out, lse), which a rematerialisation policy may keep


class Fold(abc.ABC):
    """Hashable and static. Arrays as in `attend`: q [B,T,H,D], k [B,S,K,D], v [B,S,K,E].

    mask: a pair is seen only if it lets it through. axes: the mesh axes that the fold communicates over. A fold over a
    plan takes it as a last argument.
    """

    mask: Mask
    axes: tuple[str, ...] = ()

    @abc.abstractmethod
    def forward(self, q, k, v, q_tokens: Tokens, k_tokens: Tokens) -> tuple[Array, Array]:
        """(out f32[B,T,H,E], lse f32[B,T,H]); 0 and -inf for rows that see nothing."""

    def shared_heads(self, axis: str | tuple[str, ...]) -> "Fold":
        """The fold of a share of its heads, which lie in order over a mesh axis."""
        return self

    @abc.abstractmethod
    def backward(self, q, k, v, q_tokens: Tokens, k_tokens: Tokens, lse, delta, d_out) -> tuple[Array, Array, Array]:
        """(dq, dk, dv) in float32, in the shapes of q, k, v."""


@dataclasses.dataclass(frozen=True)
class Tiled(Fold):
    """All given keys by one form, or those of a list of tiles; `sizes` of its tiles, by default the form's own choice."""

    form: str
    mask: Mask
    scale: float
    softcap: float | None = None
    sizes: tuple[int, ...] | None = None
    decay: Decay | None = None

    def forward(self, q, k, v, q_tokens, k_tokens, tiles=None, bias=None):
        return FORMS[self.form].forward(q, k, v, q_tokens, k_tokens, **self._options(q, tiles, bias))

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out, tiles=None, bias=None):
        options = self._options(q, tiles, bias)
        return FORMS[self.form].backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out, **options)

    def shared_heads(self, axis):
        return self if self.decay is None else dataclasses.replace(self, decay=self.decay.shared(axis))

    def _options(self, q, tiles, bias: Bias | None):
        """bias: of these queries, where they are others than the fold's."""
        options: dict[str, Any] = {"mask": self.mask, "scale": self.scale, "softcap": self.softcap}
        if self.decay is not None:
            options["bias"] = self.decay.bias(q) if bias is None else bias
        if tiles is not None:
            return options | LISTED[self.form](*self.sizes) | {"tiles": tiles}
        return options if self.sizes is None else options | {"sizes": self.sizes}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    fold: Fold,
    q: Float[Array, "B T H _"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    q_tokens: Tokens,
    k_tokens: Tokens,
    *plan: Any,
) -> tuple[Float[Array, "B T H E"], Float[Array, "B T H"]]:
    """`fold.forward`, differentiable in q, k and v with cotangents for out and lse; tokens and plan get no gradient."""
    return fold.forward(q, k, v, q_tokens, k_tokens, *plan)


def _save(fold, *inputs):
    # The barrier keeps a scan over layers from hoisting what depends on the tokens alone into residuals, tile by tile.
    inputs = jax.lax.optimization_barrier(inputs)
    out, lse = checkpoint_name(fold.forward(*inputs), SAVED)
    return (out, lse), (*inputs, out, lse)


def _pull(fold, saved, cotangents):
    q, k, v, q_tokens, k_tokens, *plan, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.where(lse == -jnp.inf, 0, jnp.sum(d_out * out, axis=-1) - d_lse)
    d_out = jnp.where((lse == -jnp.inf)[..., None], 0, d_out)
    gradients = fold.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out, *plan)
    return *(g.astype(x.dtype) for g, x in zip(gradients, (q, k, v), strict=True)), None, None, *(None for _ in plan)


attention.defvjp(_save, _pull)
