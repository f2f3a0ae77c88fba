"""The KV cache of every method: slots that a codec fills, chosen by a policy, behind a few tokens in full precision.

A pass appends its tokens as they are; its queries meet the slots, the tokens that wait and the pass itself, parts of one
softmax; then `prune` moves into slots what is ready, coded, and the policy drops or merges. So what exists at most is the
compressed cache and one pass, in a prefill by chunks too. Attention to slots decodes a span of them at a time.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lcx.attention.attend import local_fold
from lcx.attention.mask import tokens_of
from lcx.attention.merge import merge
from lcx.attention.sharded import own_heads, whole_groups
from lcx.attention.split_keys import split_axes, summed_up
from lcx.batch import PADDING, TokenInfo
from lcx.cache.cache import At, KeysCache
from lcx.cache.codecs.codec import Codec, Quantizer
from lcx.cache.codecs.plain import Plain
from lcx.cache.found import found_in
from lcx.cache.kv_state import Held, KVState, Pass, Waiting, grown, joined, no_tokens, whole_tiles
from lcx.cache.layered import Layered, rows_from, rows_of
from lcx.cache.policies.policy import Policy
from lcx.cache.pruning import Pruning
from lcx.cache.scorers.scorer import Rule
from lcx.cache.selectors.selector import Selector
from lcx.parallel.rules import Rules, ambient_mesh, shard
from lcx.positions.frequencies import Frequencies
from lcx.record import replaced
from pallas_kernels.tile_attention import op

OF_TOKENS = ("k", "v", "marks", "counts", "pages")  # what is held of each, or of a page of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache(KeysCache):
    """codec: how slots hold keys and values. policy: which tokens stay, selector: which of them a pass reads; None is all.
    keys: whether slots hold rotated or raw keys. positions: where slots stand for the rope, at their tokens' `own` positions,
    or side by side right before the tokens that came last (`slots`: StreamingLLM, 2023; raw keys of plain text), so that no
    distance outgrows what the model knows."""

    codec: Codec = Plain()
    policy: Policy | None = None
    selector: Selector | None = None
    positions: Literal["own", "slots"] = "own"

    def validate(self):
        for field, part in (("codec", self.codec), ("policy", self.policy)):
            self.check(self.keys == "raw" or part is None or not part.raw, "keys", f"'raw', which {field} = {part} reads")
        rotates = self.policy is not None and self.policy.rotated
        self.check(self.keys == "rotated" or not rotates, "keys", f"'rotated', which policy = {self.policy} writes to")
        self.check(
            self.positions == "own" or self.keys == "raw", "keys", "'raw' beside positions = 'slots', which turns keys anew"
        )
        told = self.policy is not None and (self.policy.queries or self.policy.turned or self.policy.expects_turns)
        wanted = f"'own' beside policy = {self.policy}, which reads at which distances queries and keys are"
        self.check(self.positions == "own" or not told, "positions", wanted)
        if self.selector is not None:
            block = self.codec.block
            wanted = f"pages of a multiple of the {block} tokens that codec = {self.codec} holds together"
            self.check(self.selector.page % block == 0, "selector", wanted)
            wanted = "'own' beside a selector, which is told of keys turned for good"
            self.check(self.positions == "own", "positions", wanted)
            counts = self.policy is not None and self.policy.marks == "received"
            wanted = f"None beside policy = {self.policy}, which counts what a query finds of all tokens"
            self.check(not counts, "selector", wanted)
            wanted = f"None beside policy = {self.policy}, as what is clustered stays in its slots"
            self.check(self.policy is None or not self.selector.prepared, "selector", wanted)
        if self.policy is not None and self.policy.rereads:
            wanted = f"beside policy = {self.policy}, which judges by what queries find of all tokens where they are"
            self.check(self.selector is None, "selector", f"None {wanted}")
            self.check(self.positions == "own", "positions", f"'own' {wanted}")

    @property
    def exact(self):
        return self.codec == Plain() and self.policy is None and self.selector is None and self.positions == "own"

    @property
    def by_token(self):
        return self.selector is not None

    @property
    def room(self):
        return self.policy.every if self.policy is not None and self.policy.scope == "prefill" else None

    @property
    def by_layer(self):
        chooses = self.selector is not None and self.selector.dense_layers > 0
        return self.codec.by_layer or chooses or (self.policy is not None and self.policy.by_layer)

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
        codec, policy, selector = self.codec, self.policy, self.selector
        B, K, G = batch_size, kv_heads, kv_heads if self.by_head else 1
        share = 1.0 if policy is None else policy.share(at.layer, at.depth)
        block = codec.block if selector is None else selector.page
        slots = length if policy is None else policy.slots(length, share)
        if policy is not None and policy.scope == "prefill" and not policy.rereads:
            slots += codec.block - 1  # what stays leaves a block in part empty, and an answer begins another
        S = whole_tiles(slots, block * at.shards)
        R = codec.first + codec.recent + codec.block - 1
        known = codec.tables(at.layer, kv_heads, head_dim, value_dim), policy and policy.tables(at.layer, kv_heads, head_dim)
        tables, known = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, *x.shape)), known)
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
        queries, zero, selects = (
            max((part.queries for part in (policy, selector) if part), default=0),
            jnp.zeros(B, jnp.int32),
            None,
        )
        if selector is not None:
            held = selector.told(self, held, tables, None)
            selects = jnp.full(B, at.layer >= selector.dense_layers and not selector.prepared)
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
            known=known,
            tables=tables,
            overflow=zero,
            selects=selects,
        )

    def length(self, state):
        return state.length if isinstance(state, KVState) else state.state.length

    def append(self, state, k, v, info, frequencies):
        k = self.held(k, info, frequencies).astype(state.waiting.k.dtype)
        info = info.filled()
        if frequencies is not None and frequencies.by_length:
            state = grown(state, info)
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
        was, exact = state.state, joined(state)
        held, kv_heads, heads = self.standing(was, exact), state.k.shape[2], q.shape[2]
        axes = split_axes(rules)
        rule = Rule(scale=scale, **{name: options.get(name) for name in ("mask", "softcap", "bias")})
        mesh = {"heads": heads, "head_axes": () if ambient_mesh() is None else rules.heads, "scale": scale}

        def local(q, q_info, held, exact, tables, selects):
            own = functools.partial(own_heads, group=heads // kv_heads, queries=q.shape[2], kv_heads=kv_heads, rules=rules)
            by_axis = lambda tree, axis: jax.tree.map(lambda x: own(x, axis=axis), tree)
            rows, first = len(q), 0
            if isinstance(held, Layered):
                if exact.k.shape[2] < kv_heads or q.shape[2] == heads:  # all heads that there are
                    held, first = rows_of(held.every), held.layer * rows
                else:
                    held = held.own()
            coded, pages = by_axis((held.k, held.v, held.counts), 1), by_axis(rows_from(held.pages, first, rows), 1)
            info = by_axis(held.info, 1) if self.by_head else held.info
            known, k, v = by_axis(tables, 1), own(exact.k, axis=2), own(exact.v, axis=2)
            k = self.turned(k, exact.info, frequencies).astype(q.dtype)
            fold = local_fold(q, k, **mesh, **options)
            find = lambda coded, info, first=0: found_in(self, fold, q, q_info, coded, info, known, frequencies, first)
            whole = lambda: find(coded, info, first)
            asks = lambda: whole_groups(q, group=heads // kv_heads, rules=rules)
            some = lambda: self.selector.found(find, asks(), q_info, rule, pages, coded, info, axes, first)
            choose = self.selector is not None and (self.selector.several or q.shape[1] == 1)
            found = jax.lax.cond(selects.any(), some, whole) if choose else whole()
            found = summed_up(*found, axes) if axes else found
            return merge(found, op.attention(fold, q, k, v.astype(q.dtype), tokens_of(q_info), tokens_of(exact.info)))

        given = (q, q_info, held, exact, was.tables, was.selects)
        if ambient_mesh() is None:
            return local(*given)
        by = lambda *names: lambda tree: jax.tree.map(lambda x: rules.partition(names[: x.ndim]), tree)
        every, layers = (held.every, (None,)) if isinstance(held, Layered) else (held, ())
        slots, waits = by(*layers, "batch", "kv_heads", "slots"), by("batch", None, "kv_heads")
        info = by(*layers, "batch", "kv_heads" if self.by_head else None, "slots")(every.info)
        every = replaced(every, info=info, **{n: slots(getattr(every, n)) for n in OF_TOKENS})
        specs = (
            by("batch", None, "heads")(q),
            by("batch")(q_info),
            replaced(held, every=every, layer=PartitionSpec()) if layers else every,
            replaced(exact, info=by("batch")(exact.info), **{n: waits(getattr(exact, n)) for n in ("k", "v", "marks")}),
            by("batch", "kv_heads")(was.tables),
            by("batch")(was.selects),
        )
        out = rules.partition(("batch", None, "heads"))
        return jax.shard_map(local, in_specs=specs, out_specs=(out, out), check_vma=False)(*given)

    def prune(self, state, asked, *, frequencies, rule, leader=None, rules=Rules()):
        return Pruning(self, asked, frequencies, rule, leader, rules)(state)

    def read(self, state, frequencies):
        """Every slot and the tokens that wait; where key heads hold their own, each is a row with one head."""
        k, v, info = self.decoded(state, frequencies)
        (B, K), G, wait = k.shape[:2], info.segments.shape[1], state.waiting
        rows = lambda x: jnp.moveaxis(x.reshape(B * G, K // G, *x.shape[2:]), 1, 2)
        join = lambda a, b: jnp.concatenate([a, b], axis=1)
        late_k = jnp.moveaxis(self.turned(wait.k, wait.info, frequencies), 2, 1)
        flat = jax.tree.map(lambda x: x.reshape(B * G, *x.shape[2:]), info)
        info = jax.tree.map(lambda a, b: join(a, jnp.repeat(b, G, axis=0)), flat, wait.info)
        return join(rows(k), rows(late_k)), join(rows(v), rows(jnp.moveaxis(wait.v, 2, 1))), info

    def turned_slots(
        self, k: Float[Array, "B K n D"], info: TokenInfo, frequencies: Frequencies | None
    ) -> Float[Array, "B K n D"]:
        """Decoded keys, rotated; infos [B, K or 1, n]."""
        if self.keys == "rotated" or frequencies is None:
            return k
        if info.positions.shape[1] == 1:
            one = jax.tree.map(lambda x: x[:, 0], info)
            return jnp.moveaxis(self.turned(jnp.moveaxis(k, 1, 2), one, frequencies), 2, 1)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), info)
        return self.turned(k.reshape(-1, k.shape[2], 1, k.shape[3]), rows, frequencies).reshape(k.shape)

    def decoded(self, state: KVState, frequencies) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S E"], TokenInfo]:
        """All slots, keys rotated."""
        held = state.slots
        k, v = (coder.decode(x, known) for coder, x, known in zip(self.coders, (held.k, held.v), state.tables, strict=True))
        return self.turned_slots(k, held.info, frequencies), v, held.info

    def standing(self, state: KVState, exact: Waiting) -> Held | Layered:
        """Slots with the positions at which they are read."""
        if self.positions == "own":
            return state.held
        held = state.slots
        there = held.info.segments != PADDING
        segments, slot, most = held.info.segments, jnp.arange(there.shape[2]), jnp.iinfo(jnp.int32).max
        ends = segments != jnp.pad(segments[:, :, 1:], ((0, 0), (0, 0), (0, 1)))  # documents stand one behind the other
        end = jax.lax.cummin(jnp.where(ends, slot, there.shape[2]), axis=2, reverse=True)
        own = segments[..., None] == exact.info.segments[:, None, None]
        nearest = jnp.where(own, exact.info.index[:, None, None], most).min(axis=3, initial=most)
        place = jnp.where(there & (nearest < most), nearest - 1 - end + slot, 0)
        positions = jnp.broadcast_to(place[..., None], held.info.positions.shape).astype(jnp.float32)
        return dataclasses.replace(held, info=replaced(held.info, positions=positions))

    @classmethod
    def examples(cls):
        from lcx.cache.policies.evict import Evict
        from lcx.cache.scorers.snapkv import SnapKV

        return cls(), cls(keys="raw", policy=Evict(score=SnapKV(window=3), keep=13, every=2))
