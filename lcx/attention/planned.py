"""Attention over a block plan: a fold of its tiles, merged with one of its columns' keys, gathered for each block of queries.

The keys of columns are gathered for some blocks at a time, forward and backward, so memory grows with GATHERED, not with the
number of blocks; their gradients are added where the keys came from.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcx.attention.merge import merge
from lcx.attention.plan import BlockPlan, allowed, lone_columns
from pallas_kernels.tile_attention import op, reference
from pallas_kernels.tile_attention.blocks import LANES
from pallas_kernels.tile_attention.decay import Decay
from pallas_kernels.tile_attention.tile_list import TileList, verified
from pallas_kernels.tile_attention.tokens import Bias, Mask, Tokens, pad_tokens, tiles
from pallas_kernels.tile_attention.triton_blocks import SMALLEST

GATHERED = 1 << 25  # numbers of keys and values that are gathered at once
SIDES = {  # tokens of a side of a block where a kernel takes it
    "tpu": (lambda n: n > 0 and n % LANES == 0, f"multiples of {LANES}"),
    "gpu": (lambda n: n >= SMALLEST and n & (n - 1) == 0, f"powers of two from {SMALLEST}"),
}


@dataclasses.dataclass(frozen=True)
class Planned(op.Fold):
    """The pairs that a plan lists and the mask lets through; `block` is the plan's. Raises ValueError for a block that the form
    does not take."""

    form: str
    mask: Mask
    scale: float
    softcap: float | None
    block: tuple[int, int]
    decay: Decay | None = None

    def __post_init__(self):
        fits, accepted = SIDES.get(self.form, (lambda n: n >= 1, "at least 1 token a side"))
        if not all(map(fits, self.block)):
            raise ValueError(f"plan: block = {self.block} in the form {self.form!r}: expected {accepted}")

    def forward(self, q, k, v, q_tokens, k_tokens, plan):
        if self.form == "reference":
            return reference.forward(q, k, v, q_tokens, k_tokens, **self._dense(plan, q))
        if q.shape[1] == 0 or k.shape[1] == 0:
            return self._whole.forward(q, k, v, q_tokens, k_tokens)
        listed = self._verified(plan, q_tokens, k_tokens)
        part = self._tiled.forward(q, k, v, q_tokens, k_tokens, listed)
        if plan.columns is None:
            return part
        gather = _Gather(plan, listed, q, k, v, k_tokens)

        def some(blocks):
            q, q_tokens, slopes, *places = blocks
            k, v, k_tokens = gather.keys(*places)
            return self._whole.forward(q, k, v, q_tokens, k_tokens, bias=self._bias(slopes))

        cut = gather.cut(q), gather.cut_tokens(q_tokens), self._slopes(gather, q)
        out, lse = jax.lax.map(some, (*cut, *gather.places))
        return merge(part, (gather.uncut(out), gather.uncut(lse)))

    def backward(self, q, k, v, q_tokens, k_tokens, lse, delta, d_out, plan):
        if self.form == "reference":
            return reference.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out, **self._dense(plan, q))
        if q.shape[1] == 0 or k.shape[1] == 0:
            return self._whole.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out)
        listed = self._verified(plan, q_tokens, k_tokens)
        dq, *totals = self._tiled.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out, listed)
        if plan.columns is None:
            return dq, *totals
        gather = _Gather(plan, listed, q, k, v, k_tokens)

        def some(totals, blocks):
            q, lse, delta, d_out, q_tokens, slopes, *places = blocks
            k, v, k_tokens = gather.keys(*places)
            bias = self._bias(slopes)
            dq, *gradients = self._whole.backward(q, k, v, q_tokens, k_tokens, lse, delta, d_out, bias=bias)
            return tuple(gather.add(total, x, places[0]) for total, x in zip(totals, gradients, strict=True)), dq

        cut = *map(gather.cut, (q, lse, delta, d_out)), gather.cut_tokens(q_tokens), self._slopes(gather, q)
        totals, more = jax.lax.scan(some, tuple(totals), (*cut, *gather.places))
        return dq + gather.uncut(more), *totals

    @property
    def _whole(self):
        return op.Tiled(self.form, self.mask, self.scale, self.softcap, decay=self.decay)

    @property
    def _tiled(self):
        return op.Tiled(self.form, self.mask, self.scale, self.softcap, self.block, self.decay)

    def _dense(self, plan, q):
        bias = None if self.decay is None else self.decay.bias(q)
        return {"mask": self.mask, "scale": self.scale, "softcap": self.softcap, "bias": bias, "allowed": allowed(plan)}

    def _slopes(self, gather, q):
        return None if self.decay is None else gather.cut(self.decay.bias(q).slopes)

    def _bias(self, slopes):
        return None if self.decay is None else Bias(slopes, self.decay.along)

    def _verified(self, plan, q_tokens, k_tokens) -> TileList:
        sides = zip((q_tokens, k_tokens), self.block, strict=True)
        return verified(plan.tiles, self.mask, *(tiles(pad_tokens(side, size), size) for side, size in sides))


class _Gather:
    """Blocks of queries as rows of their own, `n` blocks of a row at once, each group's heads apart: [steps, B n G, bq, ...].

    places: of a step's columns [steps, B, n, G, C], and which of them count.
    """

    def __init__(self, plan: BlockPlan, listed: TileList, q, k, v, k_tokens: Tokens):
        self.k, self.v, self.k_tokens, self.T, self.bq = k, v, k_tokens, q.shape[1], plan.block[0]
        columns, counts = lone_columns(plan, listed)
        self.B, self.G, self.Q, C = columns.shape
        K = k.shape[2]
        self.heads = jnp.arange(self.G)[:, None] * K // self.G + jnp.arange(max(1, K // self.G))  # key heads of a group
        each = self.B * self.G * C * self.heads.shape[1] * (k.shape[-1] + v.shape[-1])
        self.n = max(1, min(self.Q, GATHERED // max(1, each)))
        self.steps = -(-self.Q // self.n)
        self.places = tuple(self._by_step(jnp.swapaxes(x, 1, 2)) for x in (columns, counts))

    def cut(self, x: Float[Array, "B T H *D"]) -> Float[Array, "steps rows bq heads *D"]:
        x = self._blocks(x)
        x = x.reshape(*x.shape[:4], self.G, -1, *x.shape[5:])
        return jnp.moveaxis(x, 4, 3).reshape(self.steps, -1, self.bq, *x.shape[5:])

    def uncut(self, x: Float[Array, "steps rows bq heads *D"]) -> Float[Array, "B T H *D"]:
        x = x.reshape(self.steps, self.B, self.n, self.G, *x.shape[2:])
        x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 3, 4)
        return x.reshape(self.B, self.steps * self.n * self.bq, -1, *x.shape[6:])[:, : self.T]

    def cut_tokens(self, tokens: Tokens) -> Tokens:
        return Tokens(*(jnp.repeat(self._blocks(x)[:, :, :, None], self.G, 3).reshape(self.steps, -1, self.bq) for x in tokens))

    def keys(self, columns: Int[Array, "B n G C"], counts):
        """(k, v, tokens) of a step's columns [B n G, C, ...]; those that do not count are padding."""
        at = self._at(columns)
        k, v = (x[at].reshape(-1, columns.shape[-1], self.heads.shape[1], x.shape[-1]) for x in (self.k, self.v))
        fields = Tokens(*(jax.vmap(lambda line, at: line[at])(x, columns) for x in self.k_tokens))
        fields = fields._replace(segments=jnp.where(counts, fields.segments, 0))
        return k, v, Tokens(*(x.reshape(-1, columns.shape[-1]) for x in fields))

    def add(self, total, x: Float[Array, "rows C heads D"], columns: Int[Array, "B n G C"]):
        """The gradients of a step's keys, added to those of all."""
        return total.at[self._at(columns)].add(x.reshape(*columns.shape, *x.shape[2:]))

    def _at(self, columns):
        return jnp.arange(self.B)[:, None, None, None, None], columns[..., None], self.heads[:, None, :]

    def _blocks(self, x):
        """[B, T, ...] as [steps, B, n, bq, ...]."""
        x = jnp.pad(x, [(0, 0), (0, self.Q * self.bq - self.T)] + [(0, 0)] * (x.ndim - 2))
        return self._by_step(x.reshape(self.B, self.Q, self.bq, *x.shape[2:]))

    def _by_step(self, x):
        """[B, Q, ...] as [steps, B, n, ...]."""
        x = jnp.pad(x, [(0, 0), (0, self.steps * self.n - self.Q)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(self.B, self.steps, self.n, *x.shape[2:]), 1, 0)
