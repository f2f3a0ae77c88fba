"""The contract of a scorer: how much the tokens of a cache are worth, by which a policy keeps or drops them."""

import abc
import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import Mask, tokens_of
from lcx.batch import TokenInfo
from lcx.positions.linear_bias import LinearBias
from lcx.record import record, static
from lcx.spec import Spec
from pallas_kernels.tile_attention.tokens import distance


@record
class Rule:
    """What is static of an attention layer: how its logits are made."""

    mask: Mask = static()
    scale: float = static()
    softcap: float | None = static()
    bias: LinearBias | None = static()


@record
class Asked:
    """Queries of one pass. q: as they met the keys; raw: before any rotation. out, lse: what they found in the keys, and of all
    that they saw. output: the matrix that heads are projected by."""

    q: Float[Array, "B T H _"]
    raw: Float[Array, "B T H D"]
    out: Float[Array, "B T H E"]
    lse: Float[Array, "B T H"]
    info: TokenInfo
    output: Float[Array, "H E M"]


@record
class Scored:
    """The tokens that a policy chooses among, [B, K, N], oldest first: those that are there in front, anything behind them.

    k: rotated as they meet queries; raw: as the cache holds them, which a policy may ask to be before their rotation. G is K,
    or 1 where all key heads hold the same tokens. count: of tokens there. newest, its info: the last queries, at least as many
    as were asked for, padding first. marks: attention received so far, and counts: the tokens that each stands for, if asked
    for. watched: what was made of all queries. known: what was known of the layer beforehand, [B, K, ...]. seen: tokens that
    the row has read; budget: that it keeps, of each key head if they differ. output: the matrix that heads are projected by;
    rule: how their logits are made; both are None where no pass was asked. leader: infos of what the layer that leads this one
    holds.
    """

    k: Float[Array, "B K N D"]
    raw: Float[Array, "B K N D"]
    v: Float[Array, "B K N E"]
    info: TokenInfo  # [B, G, N]
    count: Int[Array, "B G"]
    newest: Float[Array, "B W H D"]
    newest_info: TokenInfo
    marks: Float[Array, "B K N"] | None
    counts: Float[Array, "B K N"] | None
    watched: Any
    known: Any
    seen: Int[Array, "B"]
    budget: Int[Array, "B *K"]
    output: Float[Array, "H E M"] | None
    frequencies: Any
    rule: Rule | None
    leader: TokenInfo | None

    @property
    def there(self) -> Bool[Array, "B G N"]:
        return jnp.arange(self.k.shape[2]) < self.count[..., None]

    def attention(self, queries: int) -> Float[Array, "B K g W N"]:
        """Probabilities that the newest `queries` queries give each token, among those that are there. Raises ValueError if
        fewer were asked for."""
        q, info = self._newest(queries)
        s = logits(q, self.k, info, self.info, self.rule)
        top = s.max(axis=-1, keepdims=True)
        p = jnp.where(s > -jnp.inf, jnp.exp(s - jnp.where(top > -jnp.inf, top, 0)), 0)
        return p / jnp.maximum(p.sum(axis=-1, keepdims=True), 1e-30)

    def looked(self, queries: int, at_once: int = 2048) -> Float[Array, "B K g N"]:
        """`attention`, summed over the queries, some of the tokens at a time: logits of all are never there at once."""
        (B, H), (K, N), size = self.newest.shape[::2], self.k.shape[1:3], min(at_once, self.k.shape[2])
        q, info = self._newest(queries)
        begins = jnp.minimum(jnp.arange(-(-N // size)) * size, N - size)

        def some(begin):
            k, k_info = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size, axis=2), (self.k, self.info))
            return logits(q, k, info, k_info, self.rule)

        def more(n, state):
            top, total = state
            s = jnp.where(begins[n] + jnp.arange(size) >= n * size, some(begins[n]), -jnp.inf)  # the last ones overlap
            new = jnp.maximum(top, s.max(axis=-1, keepdims=True))
            low = jnp.where(new > -jnp.inf, new, 0)
            return new, total * jnp.exp(top - low) + jnp.exp(s - low).sum(axis=-1, keepdims=True)

        def put(n, found):
            p = jnp.exp(some(begins[n]) - low) / total
            return jax.lax.dynamic_update_slice_in_dim(found, p.sum(axis=3), begins[n], axis=3)

        nothing = jnp.full((B, K, H // K, queries, 1), -jnp.inf), jnp.zeros((B, K, H // K, queries, 1))
        top, total = jax.lax.fori_loop(0, len(begins), more, nothing)
        low, total = jnp.where(top > -jnp.inf, top, 0), jnp.maximum(total, 1e-30)
        return jax.lax.fori_loop(0, len(begins), put, jnp.zeros((B, K, H // K, N)))

    def _newest(self, queries: int) -> tuple[Float[Array, "B W H D"], TokenInfo]:
        if not 0 < queries <= (held := self.newest.shape[1]):
            raise ValueError(f"attention({queries}): expected 1 to {held} queries, which the property `queries` asks for")
        return self.newest[:, -queries:], jax.tree.map(lambda x: x[:, -queries:], self.newest_info)


def logits(
    q: Float[Array, "B T H D"], k: Float[Array, "B K N D"], q_info: TokenInfo, k_info: TokenInfo, rule: Rule
) -> Float[Array, "B K g T N"]:
    """Scores of queries and tokens, -inf where the mask shows none."""
    (B, T, H, D), K = q.shape, k.shape[1]
    q = q.astype(jnp.float32).reshape(B, T, K, H // K, D) * rule.scale
    s = jnp.einsum("btkgd,bknd->bkgtn", q, k.astype(jnp.float32), precision="highest")
    s = s if rule.softcap is None else rule.softcap * jnp.tanh(s / rule.softcap)
    rows = jax.tree.map(lambda x: x[:, None, :, None], tokens_of(q_info))
    columns = jax.tree.map(lambda x: x[:, :, None, :], tokens_of(k_info))
    if rule.bias is not None:
        slopes = jnp.asarray(rule.bias.slopes(H), jnp.float32).reshape(K, H // K, 1, 1)
        s = s - slopes * distance(rows, columns, rule.bias.along)[:, :, None]
    return jnp.where(rule.mask.visible(rows, columns)[:, :, None], s, -jnp.inf)


def received(
    asked: Asked, k: Float[Array, "B K N D"], k_info: TokenInfo, rule: Rule, at_once: int = 64
) -> Float[Array, "B K N"]:
    """Attention that tokens receive of all queries of a pass, summed over them and the heads of a group."""
    (B, T), K = asked.q.shape[:2], k.shape[1]
    at_once = min(at_once, T)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, -T % at_once)) + ((0, 0),) * (x.ndim - 2))
    cut = lambda x: jnp.moveaxis(pad(x).reshape(B, -1, at_once, *x.shape[2:]), 1, 0)

    def some(part):
        q, lse, info = part
        lse = jnp.moveaxis(lse.reshape(B, at_once, K, -1), 1, 3)[..., None]
        s = logits(q, k, info, k_info, rule)
        known = (s > -jnp.inf) & (lse > -jnp.inf)
        return jnp.where(known, jnp.exp(jnp.where(known, s - lse, 0)), 0).sum(axis=(2, 3))

    return jax.lax.map(some, jax.tree.map(cut, (asked.q, asked.lse, asked.info))).sum(axis=0)


def mean_of_group(x: Float[Array, "B K g *n"]) -> Float[Array, "B K *n"]:
    return x.mean(axis=2)


class Reads:
    """What a scorer or a policy needs to be given beside keys and values; nothing, unless it says so."""

    @property
    def queries(self) -> int:
        """The newest queries that it reads (`Scored.newest`)."""
        return 0

    @property
    def marks(self) -> Literal["", "received", "within chunks", "repeated"]:
        """What it reads of the attention that every token got so far (`Scored.marks`): nothing, all of it, that of its
        neighbours on both sides, or the most that it got as its text was repeated, a second reading."""
        return ""

    def mark(self, asked: Asked, k: Float[Array, "B K N D"], k_info: TokenInfo, rule: Rule, new: int) -> Float[Array, "B K N"]:
        """What the queries of a pass add to the marks of tokens, the last `new` of which are the pass itself."""
        return received(asked, k, k_info, rule)

    @property
    def raw(self) -> bool:
        """Whether it reads keys before their rotation."""
        return False

    @property
    def turned(self) -> bool:
        """Whether it reads keys as one rotation turns them, which under a distance plan there is not."""
        return False

    @property
    def expects_turns(self) -> bool:
        """Whether it asks how queries to come are rotated."""
        return False

    def watch(self, watched: Any, asked: Asked) -> Any:
        """What it makes of the queries of one more pass; of none at first."""
        return watched

    def watching(self, rows: int, heads: int, head_dim: int) -> Any:
        """What it has made of no queries: arrays [B, ...]."""
        return None

    @property
    def by_layer(self) -> bool:
        """Whether layers differ in what it is or knows."""
        return False

    def tables(self, layer: int, kv_heads: int, head_dim: int) -> Any:
        """What it knows of a layer beforehand: arrays [K, ...] (`Scored.known`). Raises SpecError if made for other sizes."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer(Reads, Spec, abc.ABC):
    """Base of every scorer. To write one, define `score`; the rest says what it needs to be given."""

    @abc.abstractmethod
    def score(self, now: Scored) -> Float[Array, "B K N"]:
        """Larger for what is worth more; +inf is kept as long as there is room. Read only where `now.there`."""


def scores_of(scorer: Scorer, now: Scored) -> Float[Array, "B K N"]:
    """What a scorer gives, in float32. Raises ValueError, naming it, for another shape than [B, K, N]."""
    scores = jnp.asarray(scorer.score(now))
    if scores.shape != (wanted := now.k.shape[:3]):
        given = f"{type(scorer).__name__}.score gave {scores.shape}"
        raise ValueError(f"{given}: expected [B, K, N] = {wanted}, a number for each row, key head and token")
    return scores.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper(Scorer):
    """A scorer that goes by another. of: what tokens are worth before."""

    of: Scorer

    @property
    def queries(self):
        return self.of.queries

    @property
    def marks(self):
        return self.of.marks

    def mark(self, *pass_, **options):
        return self.of.mark(*pass_, **options)

    @property
    def raw(self):
        return self.of.raw

    @property
    def by_layer(self):
        return self.of.by_layer

    def tables(self, layer, kv_heads, head_dim):
        return self.of.tables(layer, kv_heads, head_dim)

    @property
    def turned(self):
        return self.of.turned

    @property
    def expects_turns(self):
        return self.of.expects_turns

    def watch(self, watched, asked):
        return self.of.watch(watched, asked)

    def watching(self, rows, heads, head_dim):
        return self.of.watching(rows, heads, head_dim)
