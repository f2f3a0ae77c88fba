"""Attention of a decoder with an Activation Beacon: keys of the own window, and of beacons of the windows before.

`batch.info` is a `BeaconInfo`: tokens of the text first, beacons behind them. The two sums of one softmax are merged; a
beacon's key is turned by its place in its window for the one and by its place in memory for the other. A projection of beacons
is the model's, with what is learned for them added to it, so that they begin as the model's own.

The state holds raw keys: of the tokens of the open window, each in its place of it, and of what memory holds, by number.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lcx.attention.attend import attend
from lcx.attention.mask import Causal, Chunk, Mask, Within
from lcx.attention.merge import merge, with_sinks
from lcx.attention.sharded import sharded_attend
from lcx.batch import PADDING, Batch, TokenInfo
from lcx.cache.dense import DenseCache
from lcx.cache.store import Store, joined
from lcx.linear import linear
from lcx.memory.activation_beacon import BEACON, BeaconInfo
from lcx.memory.model_memory import added
from lcx.mixers.attention import Attention, AttentionModule
from lcx.mixers.mixer import Inherited, Place
from lcx.parallel.gathered import logical_axes
from lcx.parallel.rules import shard
from lcx.positions.rotate import rotate
from lcx.record import record

PLAIN = {"mask": Causal(), "distances": None, "query_scale": None, "distance_bias": None, "persistent": 0}
PLAIN |= {"cache": DenseCache()}  # keys are raw, in a store of their own


@record
class BeaconAttentionState:
    """overflow: entries that found no slot."""

    remedy: ClassVar[str] = "rows of fewer tokens, or a state that was made for more"

    window: Store
    memory: Store
    overflow: Int[Array, "B"]


class BeaconAttentionModule(AttentionModule):
    def __init__(self, spec: Attention, inherited: Inherited, rngs: nnx.Rngs):
        super().__init__(spec, inherited, rngs)
        for field, plain in PLAIN.items():
            spec.check(getattr(spec, field) == plain, field, f"{plain} beside {type(inherited.beacons).__name__}")
        for name in inherited.beacons.own:
            for part in (name, f"{name}_bias"):
                if (base := getattr(self, part)) is not None:
                    setattr(self, f"beacon_{part}", added(jnp.zeros(base.shape), logical_axes(base, base.ndim)))

    def __call__(
        self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place(), beside: Any = None
    ):
        """Raises ValueError for a batch that is not laid out, or for `beside`."""
        info, rules = batch.info, self.inherited.rules
        if not isinstance(info, BeaconInfo) or beside is not None:
            raise ValueError("attention: its model has beacons: expected a batch that they are laid out in, and nothing beside")
        q = self._projected(x, info, "query", "heads")
        k = self._projected(x, info, "key", "kv_heads")
        v = self._projected(x, info, "value", "kv_heads")
        frequencies = self._frequencies_at(x.shape[1], place)
        turned = lambda y, info, side: (
            y if frequencies is None else rotate(y, info.positions, frequencies, side=side).astype(y.dtype)
        )
        options = {"scale": self.spec.softmax_scale, "softcap": self.spec.softcap, "backend": self.spec.backend}
        if state is None:
            options |= {"rules": rules, "communication": self.inherited.communication}
        call = sharded_attend if state is None else attend
        asking = turned(q, info, "query")

        def fold(columns: slice, q_info: TokenInfo, keys: Store, k_info: TokenInfo, mask: Mask, asking=asking):
            return call(asking[:, columns], turned(keys.k, k_info, "key"), keys.v, q_info, k_info, mask=mask, **options)

        new = Store(k=k, v=v, info=info)
        out, lse = self._near(fold, new, state)
        most, sink = self.inherited.beacons.most, self.inherited.beacons.sink
        for keys in self._far(new, state):
            read = info.reading(), keys
            if most is None:
                found = [fold(slice(None), *read, keys.info.held(), Causal())]
            else:
                found = [fold(slice(None), *read, keys.info.held(first=sink), Within(size=most))]
            if most is not None and sink:  # as near as if what was dropped had never stood between
                closer = turned(q, info.without(jnp.maximum(info.seen - sink - most, 0)), "query")
                found.append(fold(slice(None), *read, keys.info.held(behind=sink), Causal(), closer))
            out, lse = functools.reduce(merge, found, (out, lse))
        if self.sinks is not None:
            out = with_sinks(out, lse, self.sinks[...])
        parts = self._parts(info, lambda weight, y: self._linear(y, weight, contracted=2), out.astype(x.dtype), "output")
        y = self._biased(jnp.concatenate(parts, axis=1), info, "output")
        return shard(y, rules, "batch", "sequence", None), None if state is None else self._kept(state, new), {}

    def _near(self, fold, new: Store, state: BeaconAttentionState | None):
        """(out, lse) over the query's own window."""
        spec, info, own = self.inherited.beacons, new.info, Chunk(size=2 * self.inherited.beacons.window)
        R = info.raw
        tokens, beacons = slice(0, R), slice(R, None)
        of = lambda store, columns, raw: Store(k=store.k[:, columns], v=store.v[:, columns], info=store.info.part(columns, raw))
        held = [] if state is None else [state.window]
        if spec.layout == "interleaved":
            if state is not None:
                held.append(dataclasses.replace(state.memory, info=state.memory.info.beacons()))
            keys = joined(*held, new)
            return fold(slice(None), info, keys, keys.info, own)
        found = []
        if R:
            keys = joined(*held, of(new, tokens, R))
            found.append(fold(tokens, info.part(tokens, R), keys, keys.info, own))
        if info.shape[1] > R:
            keys = joined(*held, new)
            own = _OwnWindow(window=spec.window, coverage=spec.coverage, previous=spec.previous)
            found.append(fold(beacons, info.part(beacons, 0), keys, keys.info, own))
        return tuple(jnp.concatenate(part, axis=1) for part in zip(*found, strict=True))

    def _far(self, new: Store, state: BeaconAttentionState | None) -> list[Store]:
        """Sets of keys among which are those in memory."""
        spec, R = self.inherited.beacons, new.info.raw
        if state is not None:
            return [joined(state.memory, new)]
        sides = [slice(R, None)] if new.info.shape[1] > R else []
        if spec.sink or 0 in spec.ratios:  # tokens that stay
            sides.append(slice(0, R))
        return [Store(k=new.k[:, s], v=new.v[:, s], info=new.info.part(s, 0)) for s in sides]

    def _kept(self, state: BeaconAttentionState, new: Store) -> BeaconAttentionState:
        """The state behind a chunk: of its newest document alone, as what came before that is not asked for again."""
        spec, info, R = self.inherited.beacons, new.info, new.info.raw
        real = info.segments != PADDING
        place = jnp.where(info.roles == BEACON, 0, jnp.arange(info.shape[1]) + 1)  # a beacon alone is of the newest document
        last = jnp.argmax(jnp.where(real, place + 1, 0), axis=1)[:, None]
        of = lambda field: jnp.take_along_axis(field, last, axis=1)
        mine = real & (info.segments == of(info.segments))
        size = 2 * spec.window
        open_ = mine & (info.roles != BEACON) & (info.index // size == of(info.index) // size)
        # The place of a token in its window, whatever beacons stand among them: as many slots as positions.
        window = state.window.put(jnp.where(open_, info.index % size, size), new) if R else state.window
        slots = state.memory.info.shape[1]
        room, stays = slots - spec.sink, mine & (info.number >= 0)
        behind = info.number - spec.sink
        newest = jnp.max(jnp.where(stays, behind, -1), axis=1, keepdims=True)
        ring = spec.most is not None
        fits = (behind > newest - room) if ring else (behind < room)
        slot = jnp.where(behind < 0, info.number, spec.sink + behind % room)
        memory = state.memory.put(jnp.where(stays & (fits | (behind < 0)), slot, slots), new)
        lost = jnp.zeros_like(state.overflow) if ring else (stays & ~fits & (behind >= 0)).sum(axis=1)
        return BeaconAttentionState(window=window, memory=memory, overflow=state.overflow + lost)

    def init_state(self, batch_size, length):
        spec = self.inherited.beacons
        entries = -(-length // spec.ratio) if spec.most is None else spec.most + spec.window // spec.ratio
        store = lambda slots: self._empty(batch_size, slots)
        none = jnp.zeros(batch_size, jnp.int32)
        return BeaconAttentionState(window=store(2 * spec.window), memory=store(spec.sink + entries), overflow=none)

    def _empty(self, rows: int, slots: int) -> Store:
        none = jnp.zeros((rows, slots), jnp.int32)
        fields = dict.fromkeys(("index", "order", "segments", "roles", "seen"), none)
        info = BeaconInfo(**fields, number=none - 1, positions=jnp.zeros((rows, slots, 1)), raw=0)
        held = jnp.zeros((rows, slots, self.spec.kv_heads, self.spec.head_dim), self.inherited.compute)
        return Store(k=held, v=held, info=info)

    def _projected(self, x, info: BeaconInfo, name: str, heads: str):
        norm = {"query": self.query_norm, "key": self.key_norm}.get(name)
        y = jnp.concatenate(self._parts(info, lambda weight, x: self._linear(x, weight), x, name), axis=1)
        y = self._biased(y, info, name)
        y = y if norm is None else norm(y)
        return shard(y, self.inherited.rules, "batch", "sequence", heads, None)

    def _biased(self, y, info: BeaconInfo, name: str):
        bias, more = getattr(self, f"{name}_bias"), getattr(self, f"beacon_{name}_bias", None)
        if bias is None:
            return y
        y = y + bias[...].astype(y.dtype)
        return y if more is None else y.at[:, info.raw :].add(more[...].astype(y.dtype))

    def _parts(self, info: BeaconInfo, product, x, name: str) -> list[Array]:
        """Of tokens and of beacons, each by its weights."""
        base, more = getattr(self, name), getattr(self, f"beacon_{name}", None)
        if more is None:
            return [product(base, x)]
        parts = []
        if info.raw:
            parts.append(product(base, x[:, : info.raw]))
        if x.shape[1] > info.raw:
            theirs = nnx.Param(base[...] + more[...], axes=logical_axes(base, base.ndim))
            parts.append(product(theirs, x[:, info.raw :]))
        return parts

    def _linear(self, x, weight, contracted: int = 1):
        return linear(x, weight, self.inherited.rules, contracted=contracted, gradient_sum=self.inherited.gradient_sum)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OwnWindow(Mask):
    """What beacons behind a window see of it, in the index and order of `BeaconInfo`."""

    window: int
    coverage: str
    previous: bool

    def term(self, q, k):
        size = 2 * self.window
        is_beacon = k.roles == BEACON
        to_beacon = is_beacon if self.previous else is_beacon & (q.index == k.index)
        to_token = ~is_beacon
        if self.coverage == "segment":
            i = (q.index % size - self.window).clip(0)
            to_token = to_token & (k.order > q.order - (q.order % size + 1) // (i + 1))
        return (q.index // size == k.index // size) & (to_beacon | to_token)

    def term_bounds(self, q, k):
        may, _ = Chunk(size=2 * self.window).term_bounds(q, k)
        return may, may & ~may

    def intervals(self, index):
        return None
