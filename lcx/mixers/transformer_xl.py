"""Transformer-XL (Dai et al. 2019): attention to the own segment and to `memory` tokens before it, which get no gradient.

Segments count from a document's start. A token i sees keys j <= i from `memory` tokens before its segment on. Keys and values
of earlier segments are made of what the layer was given there, without its gradient; the matrices that make them have theirs.
The published score is of contents and of distances, with u, v [H,D] and W [M,H,D] learned,

    ((q_i + u) k_j + (q_i + v) (R_n W)) / sqrt(D),   n = i - j, at most `clamp`,   R_n = [sin(n f) | cos(n f)],
    f_m = 10000 ** (-2 m / M)

Whole rows are read at once, as sums of one softmax over keys of the own segment and keys before it. With a = (q_i + v) W, the
second term is a, turned by i, times [-sin(j f) | cos(j f)]: M more channels of queries and keys, for any form of attention. All
distances from `clamp` on have one R, which adds the same to the scores of a query: a sum of its own.

u and v are of all layers in the authors' code; here each layer has its own. The state holds keys and values of a document's
newest tokens, as many as the next one may see. Gradients end at segments in whole rows; a state is for generation.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.attend import attend
from lcx.attention.mask import Beyond, Causal, Chunk, Mask, Within
from lcx.attention.merge import merge
from lcx.attention.sharded import sharded_attend
from lcx.batch import PADDING, Batch, TokenInfo, lengths_of
from lcx.cache.dense import DenseCache, grown
from lcx.cache.store import Store, joined
from lcx.mixers.attention import Attention, AttentionModule
from lcx.mixers.mixer import Inherited, Mixer, Place, weight
from lcx.mixers.neighbours import resumed
from lcx.parallel.rules import shard
from lcx.positions.frequencies import Frequencies, FrequencyRule, geometric
from lcx.positions.rotate import rotate, tables
from lcx.record import record, static
from pallas_kernels.target import precision

Parts = list[tuple[Mask, bool]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXL(Mixer):
    """attention: its heads. segment, memory: tokens. relative: whether scores go by distance as published, or as the rope of
    the attention turns. clamp: distances above it count as it. same_length: tokens see only keys less than `memory` away."""

    attention: Attention
    segment: int = 512
    memory: int = 512
    relative: Literal["published", "rope"] = "published"
    clamp: int | None = None
    same_length: bool = False

    def validate(self):
        attention, published = self.attention, self.relative == "published"
        self.check(self.segment >= 1, "segment", "at least 1 token")
        self.check(self.memory >= 0, "memory", "0 or a positive number")
        self.check(self.memory >= 1 or not self.same_length, "memory", "at least 1 token beside same_length, which sees it all")
        self.check(attention.mask == Causal(), "attention", "one whose mask is Causal(), of which segments leave a part")
        self.check(attention.distances is None, "attention", "one whose distances is None: no method combines them")
        self.check(isinstance(attention.cache, DenseCache), "attention", "one whose cache is a DenseCache")
        unturned = attention.rope == "none" or not published
        self.check(unturned, "attention", "one whose rope is 'none' beside relative = 'published', by which scores go")
        self.check(self.clamp is None or self.clamp >= 1, "clamp", "at least 1 token, or None")
        self.check(self.clamp is None or published, "clamp", "None beside relative = 'rope', which turns by any distance")
        capped = self.clamp is not None and attention.softcap is not None
        self.check(not capped, "clamp", "None beside a softcap, which is of whole scores")

    @property
    def by_index(self) -> bool:
        return self.relative == "published"

    @property
    def near(self) -> Parts:
        """What a token sees of its segment: masks, and whether distances of their pairs count as `clamp`."""
        return self._parts(Chunk(size=self.segment), self.segment - 1)

    @property
    def far(self) -> Parts:
        """What it sees before its segment."""
        behind = _Behind(segment=self.segment, memory=self.memory)
        return self._parts(behind, self.segment - 1 + self.memory) if self.memory else []

    @property
    def seen(self) -> Parts:
        """What it sees in all."""
        if not self.memory:
            return self.near
        mask = Chunk(size=self.segment) | _Behind(segment=self.segment, memory=self.memory)
        return self._parts(mask, self.segment - 1 + self.memory)

    def _parts(self, mask: Mask, farthest: int) -> Parts:
        if self.same_length:
            mask, farthest = mask & Within(size=self.memory), min(farthest, self.memory - 1)
        if self.clamp is None or farthest <= self.clamp:
            return [(mask, False)]
        return [(mask & Within(size=self.clamp), False), (mask & Beyond(size=self.clamp), True)]

    def build(self, inherited, *, rngs):
        return TransformerXLModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        heads = {"heads": 4, "kv_heads": 2, "head_dim": 4}
        return (
            cls(attention=Attention(**heads, rope="none"), segment=4, memory=5),
            cls(attention=Attention(**heads, rope="none", bias="all"), segment=3, memory=6, clamp=2, same_length=True),
            cls(attention=Attention(**heads, sinks="learned", persistent=2), segment=4, memory=2, relative="rope"),
        )


@record
class TransformerXLState:
    """store: the newest tokens of a document, each in the slot of its index modulo how many there are. index, segments: of the
    newest. length: tokens of a row that it is made for."""

    store: Store
    index: Int[Array, "B"]
    segments: Int[Array, "B"]
    length: int = static()


class TransformerXLModule(AttentionModule):
    def __init__(self, spec: TransformerXL, inherited: Inherited, rngs: nnx.Rngs):
        super().__init__(spec.attention, inherited, rngs)
        self.recurrence = spec
        if spec.relative == "published":
            M, H, D = inherited.width, spec.attention.heads, spec.attention.head_dim
            spec.check(M % 2 == 0, "relative", f"'rope' in a model of odd width {M}, as sinusoids come in pairs")
            self.position = weight(rngs, (M, H, D), ("width", "heads", None), fan_in=M)
            self.content_bias, self.position_bias = (nnx.Param(jnp.zeros((H, D)), axes=("heads", None)) for _ in range(2))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        spec, attention, info = self.recurrence, self.spec, batch.info
        frequencies = self._frequencies_at(x.shape[1] if state is None else state.length, place)
        scaled = attention.query_scale is not None and attention.query_scale.reads_lengths
        if state is None and (scaled or (frequencies is not None and frequencies.by_length)):
            info = dataclasses.replace(info, lengths=lengths_of(info))
        content, turned, added = self._asking(x, info, frequencies, place)
        options = {"scale": attention.softmax_scale, "softcap": attention.softcap, "bias": attention.distance_bias}
        options |= {"backend": attention.backend}
        if state is None:
            call, cache, broken = sharded_attend, DenseCache(keys="raw"), None
            options |= {"rules": self.inherited.rules, "communication": self.inherited.communication}
            sets = [(self._store(x, info), spec.near), (self._store(jax.lax.stop_gradient(x), info), spec.far)]
        else:
            call, cache = attend, attention.cache
            new = self._store(x, self._held_info(state, info))
            new = dataclasses.replace(new, k=cache.held(new.k, new.info, frequencies))
            keys, broken, state = self._resumed(state, new, frequencies)
            sets = [(keys, spec.seen)]
        found = []
        for keys, parts in sets:
            k = cache.turned(keys.k, keys.info, frequencies)
            for mask, clamped in parts:
                q, held = (content, k) if clamped else (turned, self._with_places(k, keys.info))
                out, lse = call(q.astype(x.dtype), held, keys.v, info, keys.info, mask=mask, **options)
                found.append((out, lse + added if clamped else lse))
        out, lse = functools.reduce(merge, found)
        out = self._with_learned(out, lse, content, info)
        if broken is not None:
            out = jnp.where(broken[..., None, None], jnp.nan, out)
        return self._output(out, x), state, {}

    def _asking(self, x, info: TokenInfo, frequencies: Frequencies | None, place: Place):
        """(queries of contents, queries of whole scores, what distances beyond `clamp` add to scores)."""
        q, attention = self._queries(x), self.spec
        factor = None
        if attention.query_scale is not None:
            factor = attention.query_scale.scale(info.index, place.layer, info.lengths)[..., None, None]
        scaled = lambda q: q if factor is None else q * factor  # rounded once it is turned
        if self.recurrence.relative == "rope":
            q = scaled(q)
            return q, q if frequencies is None else rotate(q, info.positions, frequencies, info.lengths), None
        content, placed = scaled(q + self.content_bias[...]), scaled(q + self.position_bias[...])
        matrix = self.position[...]
        by_sinusoid = jnp.einsum("bthd,mhd->bthm", placed.astype(x.dtype), matrix.astype(x.dtype), precision=precision(x.dtype))
        turned = rotate(by_sinusoid, _places(info), self._sinusoids)
        added = None
        if self.recurrence.clamp is not None:
            angles = self.recurrence.clamp * self._sinusoids.inv_freq
            farthest = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)]), jnp.float32)
            of_head = jnp.einsum("m,mhd->hd", farthest, matrix, precision="highest")
            added = self.spec.softmax_scale * jnp.einsum("bthd,hd->bth", placed, of_head, precision="highest")
        return content, jnp.concatenate([content, turned], axis=-1), added

    @property
    def _sinusoids(self) -> Frequencies:
        inv_freq = geometric(10_000.0, self.inherited.width)
        return Frequencies(inv_freq=inv_freq, axis=np.zeros(len(inv_freq), np.int32))

    def _with_places(self, k: Float[Array, "B S K D"], info: TokenInfo) -> Float[Array, "B S K _"]:
        if self.recurrence.relative == "rope":
            return k
        cosine, sine = tables(_places(info), self._sinusoids)
        places = jnp.concatenate([-sine, cosine], axis=-1)[:, :, None].astype(k.dtype)
        places = jnp.broadcast_to(places, (*k.shape[:3], places.shape[-1]))
        return shard(jnp.concatenate([k, places], axis=-1), self.inherited.rules, "batch", "sequence", "kv_heads", None)

    def _store(self, x, info: TokenInfo) -> Store:
        k, v = self._keys(x)
        return Store(k=k, v=v, info=info)

    def _held_info(self, state: TransformerXLState, info: TokenInfo) -> TokenInfo:
        """With all fields that those of the store have."""
        axes = state.store.info.positions.shape[-1]
        return dataclasses.replace(info.filled(), positions=jnp.broadcast_to(info.positions, (*info.shape, axes)))

    def _resumed(
        self, state: TransformerXLState, new: Store, frequencies: Frequencies | None
    ) -> tuple[Store, Bool[Array, "B T"], TransformerXLState]:
        """(keys that a chunk may see, tokens that cannot be answered, the state behind it). What all documents see is not held:
        it is not answered."""
        info, room = new.info, state.store.info.shape[1]
        real = info.segments != PADDING
        broken, index, segments = resumed(info, state.index, state.segments, lost=info.segments < 0)
        first = jnp.argmax(real, axis=1)[:, None]
        at_first = lambda field: jnp.take_along_axis(field, first, axis=1)[:, 0]
        goes_on = (at_first(info.segments) == state.segments) & (at_first(info.index) == state.index + 1)
        store = _only(state.store, (goes_on | ~real.any(axis=1))[:, None])
        keys = joined(store, new)
        if frequencies is not None and frequencies.by_length:
            keys = dataclasses.replace(keys, info=grown(keys.info, info))
        mine = (info.segments == segments[:, None]) & (info.index > index[:, None] - room) & real
        store = _only(store, store.info.segments == segments[:, None])
        store = store.put(jnp.where(mine, info.index % room, room), new)
        return keys, broken, dataclasses.replace(state, store=store, index=index, segments=segments)

    def init_state(self, batch_size, length):
        attention, rule = self.spec, self._rope
        slots = max(1, self.recurrence.segment - 1 + self.recurrence.memory)
        axes = max(1, len(rule.sections)) if isinstance(rule, FrequencyRule) else 1
        none = jnp.zeros((batch_size, slots), jnp.int32)
        positions = jnp.zeros((batch_size, slots, axes))
        info = TokenInfo(index=none, order=none, positions=positions, segments=none, roles=none, lengths=none)
        held = jnp.zeros((batch_size, slots, attention.kv_heads, attention.head_dim), self.inherited.compute)
        store = Store(k=held, v=held, info=info)
        return TransformerXLState(store=store, index=none[:, 0], segments=none[:, 0], length=length)


def _places(info: TokenInfo) -> Float[Array, "B T 1"]:
    return jnp.asarray(info.index, jnp.float32)[..., None]


def _only(store: Store, stays: Bool[Array, "B #S"]) -> Store:
    """The store with other slots empty."""
    return dataclasses.replace(
        store, info=dataclasses.replace(store.info, segments=jnp.where(stays, store.info.segments, PADDING))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Behind(Mask):
    """Keys before the query's segment, at most `memory` before its start."""

    segment: int
    memory: int

    def term(self, q, k):
        start = q.index // self.segment * self.segment
        return (k.index < start) & (k.index >= start - self.memory)

    def term_bounds(self, q, k):
        low, high = (index // self.segment * self.segment for index in (q.index_low, q.index_high))
        may = (k.index_low < high) & (k.index_high >= low - self.memory)
        return may, (k.index_high < low) & (k.index_low >= high - self.memory)

    def intervals(self, index):
        start = index // self.segment * self.segment
        return [(start - self.memory, start)]
