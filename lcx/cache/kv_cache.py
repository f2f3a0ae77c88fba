"""The KV cache of every method: slots that a codec fills, chosen by a policy, behind a few tokens in full precision.

A pass appends its tokens as they are; its queries meet the slots, the tokens that wait and the pass itself, parts of one
softmax; then `prune` moves into slots what is ready, coded, and the policy drops or merges. So what exists at most is the
compressed cache and one pass, in a prefill by chunks too. Attention to slots decodes a span of them at a time.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.attend import local_fold
from lcx.attention.mask import tokens_of
from lcx.attention.merge import merge
from lcx.attention.sharded import own_heads
from lcx.attention.split_keys import split_axes, summed_up
from lcx.batch import PADDING, TokenInfo
from lcx.cache.cache import At, KeysCache
from lcx.cache.codecs.codec import Codec, Quantizer
from lcx.cache.codecs.plain import Plain
from lcx.cache.kv_state import Held, KVState, Pass, Waiting, no_tokens, rounded_up, stored_blocks, taken, taken_first
from lcx.cache.policies.policy import Policy
from lcx.cache.scorers.scorer import Asked, Rule, Scored
from lcx.cache.spans import Slots, attend_slots
from lcx.parallel.rules import Rules, ambient_mesh, shard
from lcx.positions.frequencies import Frequencies
from lcx.record import replaced
from pallas_kernels.target import platform
from pallas_kernels.tile_attention import op

OF_TOKENS = ("k", "v", "marks", "counts")  # what is held of each


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache(KeysCache):
    """codec: how slots hold keys and values. policy: which tokens stay; None is all. keys: whether slots hold rotated or raw
    keys. positions: where slots stand for the rope, at their tokens' `own` positions, or side by side right before the tokens
    that came last (`slots`: StreamingLLM, 2023; raw keys of plain text), so that no distance outgrows what the model knows."""

    codec: Codec = Plain()
    policy: Policy | None = None
    positions: Literal["own", "slots"] = "own"

    def validate(self):
        for field, part in (("codec", self.codec), ("policy", self.policy)):
            self.check(self.keys == "raw" or part is None or not part.raw, "keys", f"'raw', which {field} = {part} reads")
        self.check(
            self.positions == "own" or self.keys == "raw", "keys", "'raw' beside positions = 'slots', which turns keys anew"
        )

    @property
    def exact(self):
        return self.codec == Plain() and self.policy is None and self.positions == "own"

    @property
    def room(self):
        return self.policy.every if self.policy is not None and self.policy.scope == "prefill" else None

    @property
    def by_layer(self):
        return self.codec.by_layer or (self.policy is not None and self.policy.by_layer)

    def leads(self, layer):
        return None if self.policy is None else self.policy.leader(layer)

    @property
    def by_head(self) -> bool:
        """Whether key heads hold tokens of their own."""
        return self.policy is not None and self.policy.by_head

    @property
    def coders(self) -> tuple[Quantizer, Quantizer]:
        return self.codec.keys, self.codec.values

    def init(self, batch_size, length, kv_heads, head_dim, value_dim, dtype, axes=1, at=At()):
        codec, policy = self.codec, self.policy
        B, K, G = batch_size, kv_heads, kv_heads if self.by_head else 1
        share = 1.0 if policy is None else policy.layers.share(at.layer, at.depth)
        S = rounded_up(length if policy is None else policy.slots(length, share), codec.block * at.shards)
        R = codec.first + codec.recent + codec.block - 1
        tables = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (B, *x.shape)), codec.tables(at.layer, kv_heads, head_dim, value_dim)
        )
        empty = lambda coder, size, known: jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(lambda: coder.encode(jnp.zeros((B, K, S, size), dtype), known)),
        )
        marks, counts = policy is not None and policy.marks, policy is not None and policy.merges
        held = Held(
            k=empty(self.coders[0], head_dim, tables[0]),
            v=empty(self.coders[1], value_dim, tables[1]),
            info=jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (B, G, *x.shape[1:])), no_tokens(B, S, axes)),
            marks=jnp.zeros((B, K, S)) if marks else None,
            counts=jnp.ones((B, K, S)) if counts else None,
        )
        waiting = Waiting(
            k=jnp.zeros((B, R, K, head_dim), dtype),
            v=jnp.zeros((B, R, K, value_dim), dtype),
            info=no_tokens(B, R, axes),
            marks=jnp.zeros((B, R, K)) if marks else None,
        )
        queries, zero = 0 if policy is None else policy.queries, jnp.zeros(B, jnp.int32)
        return KVState(
            length=length,
            share=share,
            held=held,
            waiting=waiting,
            used=jnp.zeros((B, G), jnp.int32),
            seen=zero,
            newest=jnp.zeros((B, queries, at.heads, head_dim), dtype),
            newest_info=no_tokens(B, queries, axes),
            watched=None if policy is None else policy.watching(B, at.heads, head_dim),
            tables=tables,
            overflow=zero,
        )

    def length(self, state):
        return state.length if isinstance(state, KVState) else state.state.length

    def append(self, state, k, v, info, frequencies):
        k = self.held(k, info, frequencies).astype(state.waiting.k.dtype)
        info = info.filled()
        if frequencies is not None and frequencies.by_length:
            state = _grown(state, info)
        return Pass(state=state, k=k, v=v.astype(state.waiting.v.dtype), info=info)

    def placed(self, state, rules):
        heads = "kv_heads" if self.by_head else None
        by = lambda *names: lambda x: shard(x, rules, *names[: x.ndim], *(None,) * (x.ndim - len(names)))
        slots, held = by("batch", "kv_heads", "slots"), state.held
        info = jax.tree.map(by("batch", heads, "slots"), held.info)
        coded = {name: jax.tree.map(slots, getattr(held, name)) for name in OF_TOKENS}
        waiting = {
            name: jax.tree.map(by("batch", None, "kv_heads"), getattr(state.waiting, name)) for name in ("k", "v", "marks")
        }
        return dataclasses.replace(
            state,
            held=dataclasses.replace(held, info=info, **coded),
            waiting=dataclasses.replace(state.waiting, **waiting),
            newest=by("batch", None, "heads")(state.newest),
        )

    def attend(self, state, q, q_info, *, frequencies, rules=Rules(), scale, **options):
        was, exact = state.state, _joined(state)
        held, kv_heads, heads = self._standing(was, exact), state.k.shape[2], q.shape[2]
        axes = split_axes(rules)

        def local(q, q_info, held, exact, tables):
            own = functools.partial(own_heads, group=heads // kv_heads, queries=q.shape[2], kv_heads=kv_heads, rules=rules)
            by_axis = lambda tree, axis: jax.tree.map(lambda x: own(x, axis=axis), tree)
            coded = by_axis((held.k, held.v, held.counts), 1)
            info = by_axis(held.info, 1) if self.by_head else held.info
            known, k, v = by_axis(tables, 1), own(exact.k, axis=2), own(exact.v, axis=2)
            size = info.segments.shape[2]
            used = jnp.where(info.segments != PADDING, jnp.arange(size) + 1, 0).max(initial=0)

            def read(part) -> Slots:
                (codes_k, codes_v, counts), info = part
                keys = self._turned(self.coders[0].decode(codes_k, known[0]), info, frequencies)
                extra = jnp.log(counts) if self.policy is not None and self.policy.weighs else None
                return Slots(keys, self.coders[1].decode(codes_v, known[1]), info, extra)

            whole = self.codec == Plain() and self.keys == "rotated"  # nothing to decode
            block = None if whole else self.codec.block
            sizes = {"size": size, "used": used, "block": block, "kv_heads": k.shape[2], "value_dim": v.shape[3]}
            mesh = {"heads": heads, "head_axes": () if ambient_mesh() is None else rules.heads, "scale": scale}
            found = attend_slots(q, q_info, (coded, info), read, **sizes, **mesh, **options)
            found = summed_up(*found, axes) if axes else found
            k = self.turned(k, exact.info, frequencies).astype(q.dtype)
            fold = local_fold(q, k, **mesh, **options)
            return merge(found, op.attention(fold, q, k, v.astype(q.dtype), tokens_of(q_info), tokens_of(exact.info)))

        if ambient_mesh() is None:
            return local(q, q_info, held, exact, was.tables)
        by = lambda *names: lambda tree: jax.tree.map(lambda x: rules.partition(names[: x.ndim]), tree)
        slots, waits, by_head = (
            by("batch", "kv_heads", "slots"),
            by("batch", None, "kv_heads"),
            "kv_heads" if self.by_head else None,
        )
        specs = (
            by("batch", None, "heads")(q),
            by("batch")(q_info),
            replaced(held, info=by("batch", by_head, "slots")(held.info), **{n: slots(getattr(held, n)) for n in OF_TOKENS}),
            replaced(exact, info=by("batch")(exact.info), **{n: waits(getattr(exact, n)) for n in ("k", "v", "marks")}),
            by("batch", "kv_heads")(was.tables),
        )
        out = rules.partition(("batch", None, "heads"))
        return jax.shard_map(local, in_specs=specs, out_specs=(out, out), check_vma=False)(q, q_info, held, exact, was.tables)

    def prune(self, state, asked, *, frequencies, rule, leader=None):
        was, policy, codec = state.state, self.policy, self.codec
        exact, held = _joined(state), was.held
        if policy is not None and policy.marks:
            exact, held = self._marked(was, exact, asked, frequencies, rule)
        real = state.info.segments != PADDING
        exact = taken_first(exact, exact.info.segments != PADDING)
        count = (exact.info.segments != PADDING).sum(axis=1)
        most = exact.k.shape[1] - codec.first - codec.recent
        moved = jnp.maximum(0, count - codec.first - codec.recent) // codec.block * codec.block
        leaving = jax.tree.map(lambda x: x[:, codec.first : codec.first + most // codec.block * codec.block], exact)
        place = jnp.arange(was.waiting.k.shape[1])
        place = jnp.where(place < codec.first, place, place + moved[:, None])
        waiting = taken(exact, jnp.minimum(place, exact.k.shape[1] - 1))
        here = place < count[:, None]
        waiting = jax.tree.map(lambda x: jnp.where(here.reshape(*here.shape, *(1,) * (x.ndim - 2)), x, 0), waiting)
        was = dataclasses.replace(
            was,
            held=held,
            waiting=waiting,
            seen=was.seen + real.sum(axis=1),
            **self._queries(was, asked, state.info),
            watched=was.watched if policy is None else policy.watch(was.watched, asked),
        )
        several = state.k.shape[1] > 1
        if policy is None or policy.scope == ("decode" if several else "prefill"):
            return self._written(was, leaving, moved, asked)
        if several:
            return _where(
                real.any(axis=1),
                self._compressed(was, leaving, moved, asked, frequencies, rule, leader),
                self._written(was, leaving, moved, asked),
            )
        full = (was.used.max(axis=1) + moved > policy.budget(was.seen, was.share) + policy.every) & (moved > 0)
        compress = lambda: _where(
            full,
            self._compressed(was, leaving, moved, asked, frequencies, rule, leader),
            self._written(was, leaving, moved, asked),
        )
        return jax.lax.cond(full.any(), compress, lambda: self._written(was, leaving, moved, asked))

    def read(self, state, frequencies):
        """Every slot and the tokens that wait; where key heads hold their own, each is a row with one head."""
        k, v, info = self._decoded(state, frequencies)
        (B, K), G, wait = k.shape[:2], info.segments.shape[1], state.waiting
        rows = lambda x: jnp.moveaxis(x.reshape(B * G, K // G, *x.shape[2:]), 1, 2)
        join = lambda a, b: jnp.concatenate([a, b], axis=1)
        late_k = jnp.moveaxis(self.turned(wait.k, wait.info, frequencies), 2, 1)
        flat = jax.tree.map(lambda x: x.reshape(B * G, *x.shape[2:]), info)
        info = jax.tree.map(lambda a, b: join(a, jnp.repeat(b, G, axis=0)), flat, wait.info)
        return join(rows(k), rows(late_k)), join(rows(v), rows(jnp.moveaxis(wait.v, 2, 1))), info

    def _turned(self, k: Float[Array, "B K n D"], info: TokenInfo, frequencies: Frequencies | None) -> Float[Array, "B K n D"]:
        """Decoded keys, rotated; infos [B, K or 1, n]."""
        if self.keys == "rotated" or frequencies is None:
            return k
        if info.positions.shape[1] == 1:
            one = jax.tree.map(lambda x: x[:, 0], info)
            return jnp.moveaxis(self.turned(jnp.moveaxis(k, 1, 2), one, frequencies), 2, 1)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), info)
        return self.turned(k.reshape(-1, k.shape[2], 1, k.shape[3]), rows, frequencies).reshape(k.shape)

    def _decoded(self, state: KVState, frequencies) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S E"], TokenInfo]:
        """All slots, keys rotated."""
        held = state.held
        k, v = (coder.decode(x, known) for coder, x, known in zip(self.coders, (held.k, held.v), state.tables, strict=True))
        return self._turned(k, held.info, frequencies), v, held.info

    def _standing(self, state: KVState, exact: Waiting) -> Held:
        """Slots with the positions at which they are read."""
        held = state.held
        if self.positions == "own":
            return held
        there = held.info.segments != PADDING
        nearest = jnp.where(exact.info.segments != PADDING, exact.info.index, jnp.iinfo(jnp.int32).max).min(axis=1)
        place = nearest[:, None, None] - there.sum(axis=2, keepdims=True) + jnp.cumsum(there, axis=2) - 1
        positions = jnp.broadcast_to(place[..., None], held.info.positions.shape).astype(jnp.float32)
        return dataclasses.replace(held, info=replaced(held.info, positions=positions))

    def _marked(self, state: KVState, exact: Waiting, asked: Asked, frequencies, rule: Rule) -> tuple[Waiting, Held]:
        """Tokens with what the queries of a pass looked at added."""
        k, _, info = self._decoded(state, frequencies)
        marks = state.held.marks + self.policy.mark(asked, k, info, rule, True)
        k = jnp.moveaxis(self.turned(exact.k, exact.info, frequencies), 2, 1)
        one = jax.tree.map(lambda x: x[:, None], exact.info)
        late = exact.marks + jnp.moveaxis(self.policy.mark(asked, k, one, rule, False), 1, 2)
        return dataclasses.replace(exact, marks=late), dataclasses.replace(state.held, marks=marks)

    def _queries(self, state: KVState, asked: Asked, info: TokenInfo) -> dict[str, Any]:
        """The newest queries after a pass."""
        if not (several := state.newest.shape[1]):
            return {}
        new = jnp.where((info.segments != PADDING)[..., None, None], asked.q, 0).astype(state.newest.dtype)
        q = jnp.concatenate([state.newest, new], axis=1)
        info = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.newest_info, info)
        order = jnp.argsort(info.segments != PADDING, axis=1, stable=True)[:, -several:]
        return {"newest": taken(q, order), "newest_info": taken(info, order)}

    def _written(self, state: KVState, leaving: Waiting, moved: Int[Array, "B"], asked: Asked) -> KVState:
        """With `moved` tokens, whole blocks, behind those that the slots hold."""
        held, (B, L), block = state.held, leaving.info.segments.shape, self.codec.block
        K, (G, S) = leaving.k.shape[2], held.info.segments.shape[1:]
        blocks = L // block
        slot = (state.used // block)[:, :, None] + jnp.arange(blocks)
        slot = jnp.where(jnp.arange(blocks) < (moved // block)[:, None, None], slot, S // block)
        heads = jnp.broadcast_to(slot, (B, K, blocks))
        by_head = lambda x: jnp.moveaxis(x, 1, 2)
        coded = [
            coder.encode(by_head(x).astype(jnp.float32), known)
            for coder, x, known in zip(self.coders, (leaving.k, leaving.v), state.tables, strict=True)
        ]
        after = asked.out if blocks == 1 and platform() == "cpu" else None
        put = functools.partial(stored_blocks, slot=heads, after=after)
        info = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (B, G, *x.shape[1:])), leaving.info)
        used = state.used + moved[:, None]
        return dataclasses.replace(
            state,
            held=Held(
                k=jax.tree.map(put, held.k, coded[0]),
                v=jax.tree.map(put, held.v, coded[1]),
                info=jax.tree.map(functools.partial(stored_blocks, slot=slot, after=after), held.info, info),
                marks=None if held.marks is None else put(held.marks, by_head(leaving.marks)),
                counts=None if held.counts is None else put(held.counts, jnp.ones((B, K, L))),
            ),
            used=jnp.minimum(used, S),
            overflow=state.overflow + jnp.maximum(used - S, 0).max(axis=1),
        )

    def _compressed(
        self,
        state: KVState,
        leaving: Waiting,
        moved: Int[Array, "B"],
        asked: Asked,
        frequencies,
        rule: Rule,
        leader: KVState | None,
    ) -> KVState:
        """With the policy's choice among what the slots hold and `moved` tokens more."""
        held, (B, L) = state.held, leaving.info.segments.shape
        K, (G, S) = leaving.k.shape[2], held.info.segments.shape[1:]
        by_head = lambda x: jnp.moveaxis(x, 1, 2)
        join = lambda a, b: jnp.concatenate([a, b], axis=2)
        loose, floats = [], []
        for coder, codes, new, known in zip(self.coders, (held.k, held.v), (leaving.k, leaving.v), state.tables, strict=True):
            old, new = coder.loosened(codes, known), by_head(new).astype(jnp.float32)
            loose.append(jax.tree.map(join, old, coder.loose(new, known)))
            floats.append(join(coder.value(old, known).astype(jnp.float32), new))
        here = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (B, G, *x.shape[1:])), leaving.info)
        here = _hidden(here, jnp.arange(L) < moved[:, None, None])
        info = jax.tree.map(join, held.info, here)
        marks = None if held.marks is None else join(held.marks, by_head(leaving.marks))
        counts = None if held.counts is None else join(held.counts, jnp.ones((B, K, L)))
        there = info.segments != PADDING
        order = jnp.argsort(~there, axis=2, stable=True)
        by_all = lambda index: jnp.broadcast_to(index, (B, K, index.shape[2]))
        pick = lambda tree, index: jax.tree.map(functools.partial(taken, place=index, axis=2), tree)
        (k, v), ordered = pick(floats, by_all(order)), pick(info, order)
        policy = self.policy
        budget = policy.budget(state.seen, state.share)
        lost = jnp.minimum(budget, state.seen) - policy.most(state.length, state.share)
        scored = Scored(
            k=self._turned(k, ordered, frequencies),
            raw=k,
            v=v,
            info=ordered,
            count=there.sum(axis=2),
            newest=state.newest,
            newest_info=state.newest_info,
            marks=None if marks is None else pick(marks, by_all(order)),
            counts=None if counts is None else pick(counts, by_all(order)),
            watched=state.watched,
            seen=state.seen,
            budget=budget,
            output=asked.output,
            frequencies=frequencies,
            rule=rule,
            leader=None if leader is None else leader.held.info,
        )
        kept = policy.compress(scored, S)
        last = jnp.where(kept.there, kept.index, 0).max(axis=2, keepdims=True)  # fills up a block that it is in
        index = jnp.where(kept.there, kept.index, last)
        origin = jnp.take_along_axis(order, index, axis=2)
        codes = []
        for coder, old, new, known in zip(self.coders, loose, (kept.k, kept.v), state.tables, strict=True):
            stays = pick(old, by_all(origin)) if new is None else coder.loose(new, known)
            codes.append(coder.tightened(stays, known))
        block, some = self.codec.block, kept.there.sum(axis=2)
        ones = None if counts is None else pick(counts, by_all(origin))
        return dataclasses.replace(
            state,
            held=Held(
                k=codes[0],
                v=codes[1],
                info=_hidden(pick(info, origin), kept.there),
                marks=None if marks is None else pick(marks, by_all(origin)),
                counts=ones if kept.counts is None else kept.counts,
            ),
            used=-(-some // block) * block,
            overflow=jnp.maximum(state.overflow, lost),
        )

    @classmethod
    def examples(cls):
        from lcx.cache.policies.evict import Evict
        from lcx.cache.scorers.snapkv import SnapKV

        return cls(), cls(keys="raw", policy=Evict(score=SnapKV(window=3), keep=13, every=2))


def _joined(state: Pass) -> Waiting:
    """The tokens in full precision: those that waited, and those of the pass."""
    join = lambda a, b: jnp.concatenate([a, b], axis=1)
    wait, marks = state.state.waiting, None
    if wait.marks is not None:
        marks = join(wait.marks, jnp.zeros((*state.info.segments.shape, state.k.shape[2])))
    return Waiting(
        k=join(wait.k, state.k), v=join(wait.v, state.v), info=jax.tree.map(join, wait.info, state.info), marks=marks
    )


def _hidden(info: TokenInfo, there: Bool[Array, "*n"]) -> TokenInfo:
    """With padding where there is no token."""
    return replaced(info, segments=jnp.where(there, info.segments, PADDING))


def _where(rows: Bool[Array, "B"], some: KVState, others: KVState) -> KVState:
    """Some rows of one state and the others of another; what has no rows is in both."""
    choose = lambda a, b: a if a is b else jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
    return jax.tree.map(choose, some, others)


def _grown(state: KVState, new: TokenInfo) -> KVState:
    """With the lengths of documents that the tokens of a pass belong to, where they grow."""

    def longer(info: TokenInfo) -> TokenInfo:
        same = (info.segments[..., None] == new.segments.reshape(-1, *(1,) * (info.segments.ndim - 1), new.shape[1])) & (
            info.segments[..., None] != PADDING
        )
        newest = jnp.where(same, new.lengths.reshape(-1, *(1,) * (info.segments.ndim - 1), new.shape[1]), 0).max(
            axis=-1, initial=0
        )
        return replaced(info, lengths=jnp.maximum(info.lengths, newest))

    held = dataclasses.replace(state.held, info=longer(state.held.info))
    return dataclasses.replace(state, held=held, waiting=dataclasses.replace(state.waiting, info=longer(state.waiting.info)))
