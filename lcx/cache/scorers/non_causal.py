"""Attention of neighbours on both sides (Compactor, 2025): what a chunk of a text looks at within itself, whatever comes after.

    a_j = mean over the group's heads of sum over queries i of j's chunk of p_ij,   p softmax over the chunk, of no causal mask
    score_j = pool_j(a_j |v_j|),   an average over `kernel` tokens, with zeros beyond both ends

Chunks are cut from the tokens of a pass that are there, and tokens of two documents do not see each other. A token of a short
pass has fewer neighbours: alone, as in decoding, it has a = 1, which is the mean of all chunks. kvpress leaves out the scale of
the logits and counts the padding of its last chunk among keys and queries (filled with -1e-9 and 0, not -inf); here the logits
are the layer's, scale and soft cap, and padding takes no part.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcx.attention.mask import Causal
from lcx.batch import PADDING, TokenInfo
from lcx.cache.kv_state import taken
from lcx.cache.scorers.scorer import Asked, Rule, Scored, Scorer, logits, mean_of_group
from lcx.cache.scorers.snapkv import pooled
from pallas_kernels.tile_attention.tokens import NEVER


class _BothSides(Causal):
    """The base rule of masks without its order."""

    def visible(self, q, k):
        return super().visible(q._replace(order=jnp.full_like(q.order, NEVER)), k)


def within_chunks(
    asked: Asked,
    k: Float[Array, "B K N D"],
    k_info: TokenInfo,
    rule: Rule,
    *,
    new: int,
    size: int,
    part: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B K N"]:
    """a of the last `new` tokens, which are the pass of the queries, and 0 of those before. k_info: [B, 1, N].

    part: which of the pass take part; the others have a = 1."""
    if not new:
        return jnp.zeros(k.shape[:3])
    (B, T), K = asked.q.shape[:2], k.shape[1]
    there = asked.info.segments != PADDING
    there = there if part is None else there & part
    order, size = jnp.argsort(~there, axis=1, stable=True), min(size, T)
    info = dataclasses.replace(asked.info, segments=jnp.where(there, asked.info.segments, PADDING))
    keys = jnp.moveaxis(k[:, :, -new:], 1, 2)

    def cut(x):
        x = taken(x, order)
        x = jnp.pad(x, ((0, 0), (0, -T % size)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    def chunk(part):
        q, k, info = part
        rows = dataclasses.replace(rule, mask=_BothSides())
        s = logits(q, jnp.moveaxis(k, 1, 2), info, jax.tree.map(lambda x: x[:, None], info), rows)
        top = s.max(axis=-1, keepdims=True)
        p = jnp.where(s > -jnp.inf, jnp.exp(s - jnp.where(top > -jnp.inf, top, 0)), 0)
        return mean_of_group((p / jnp.maximum(p.sum(axis=-1, keepdims=True), 1e-30)).sum(axis=3))

    found = jax.lax.map(chunk, jax.tree.map(cut, (asked.q, keys, info)))
    found = jnp.moveaxis(found, 0, 2).reshape(B, K, -1)[:, :, :T]
    found = jnp.take_along_axis(found, jnp.argsort(order, axis=1)[:, None], axis=2)
    found = jnp.where(there[:, None], found, 1.0)
    return jnp.pad(found, ((0, 0), (0, 0), (k.shape[2] - new, 0)))


def weighed(now: Scored, there: Bool[Array, "B G N"], kernel: int) -> Float[Array, "B K N"]:
    """Attention within chunks times the norm of the value, pooled over the tokens that are there."""
    return pooled(jnp.where(there, now.marks * jnp.linalg.norm(now.v, axis=-1), 0), kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NonCausal(Scorer):
    """chunk: tokens. kernel: of the pool, an odd number."""

    chunk: int = 256
    kernel: int = 3

    def validate(self):
        self.check(self.chunk >= 1, "chunk", "at least 1 token")
        self.check(self.kernel >= 1 and self.kernel % 2 == 1, "kernel", "an odd number")

    @property
    def marks(self):
        return "within chunks"

    def mark(self, asked, k, k_info, rule, new):
        return within_chunks(asked, k, k_info, rule, new=new, size=self.chunk)

    def score(self, now):
        return weighed(now, now.there, self.kernel)

    @classmethod
    def examples(cls):
        return (cls(chunk=8),)
