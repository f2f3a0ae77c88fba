"""What becomes of a KV cache after a pass: tokens wait, move into slots coded, or are dropped and merged by the policy."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.split_keys import split_axes
from lcx.batch import PADDING, TokenInfo
from lcx.cache.kv_state import Held, KVState, Pass, Waiting, hidden, joined, taken, taken_first, whole_tiles
from lcx.cache.layered import Layered
from lcx.cache.picking import on_own_heads, picked, places
from lcx.cache.repeated import repeated
from lcx.cache.scorers.scorer import Asked, Rule, Scored
from lcx.cache.writing import in_place, with_blocks
from lcx.parallel.gathered import axes_size
from lcx.parallel.rules import Rules
from lcx.positions.frequencies import Frequencies
from lcx.record import replaced


@dataclasses.dataclass(frozen=True)
class Pruning:
    """After a pass of a cache's queries. leader: the state of the layer whose choice is this one's too. rules: how the cache
    lies on a mesh."""

    cache: Any
    asked: Asked | None = None
    frequencies: Frequencies | None = None
    rule: Rule | None = None
    leader: KVState | None = None
    rules: Rules = Rules()

    def __call__(self, state: Pass) -> KVState:
        """The state after the pass."""
        was, policy = state.state, self.cache.policy
        if policy is None or policy.rereads:
            adds = was.repeats is None
        else:
            adds = not policy.marks and policy.scope == ("decode" if state.k.shape[1] > 1 else "prefill")
        if adds or not isinstance(was.held, Layered):
            return self._pruned(state)
        new = self._pruned(dataclasses.replace(state, state=dataclasses.replace(was, held=was.slots)))
        slots = {field.name: getattr(new.held, field.name) for field in dataclasses.fields(Held)}
        return dataclasses.replace(new, held=was.held.put(**slots))

    def _pruned(self, state: Pass) -> KVState:
        was, policy, codec = state.state, self.cache.policy, self.cache.codec
        if was.repeats is not None:
            return repeated(self.cache, state, self.asked, self.frequencies, self.rule)
        exact, held = joined(state), was.held
        if policy is not None and policy.marks and not policy.rereads:
            exact, held = self._marked(was, exact)
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
            **self._queries(was, state.info),
            watched=was.watched if policy is None else policy.watch(was.watched, self.asked),
        )
        several = state.k.shape[1] > 1
        if policy is None or policy.rereads or policy.scope == ("decode" if several else "prefill"):
            return self._written(was, leaving, moved)
        if several:
            return _where(real.any(axis=1), self._compressed(was, leaving, moved), was)  # the others have nothing to move
        full = policy.full(was.used + moved[:, None], was.seen, was.share, was.known) & (moved > 0)
        compress = lambda: _where(
            full,
            self._compressed(was, leaving, moved),
            self._written(was, leaving, moved),
        )
        return jax.lax.cond(full.any(), compress, lambda: self._written(was, leaving, moved))

    def once(self, state: KVState, budget: Int[Array, "B K"], slots: int) -> KVState:
        """A state of so many slots, whole blocks and shares of a mesh, with the policy's choice of as many tokens a key head
        among all that its slots held."""
        block, most = self.cache.codec.block, state.held.info.segments.shape[2]
        slots = whole_tiles(slots + block - 1, block * axes_size(split_axes(self.rules)))  # an answer begins another
        nothing = jax.tree.map(lambda x: jnp.zeros((len(x), block, *x.shape[2:]), x.dtype), state.waiting)
        empty = jnp.zeros(len(state.seen), jnp.int32)
        return self._compressed(state, nothing, empty, budget=budget, slots=min(slots, most))

    def _marked(self, state: KVState, exact: Waiting) -> tuple[Waiting, Held]:
        """Tokens with what the queries of a pass looked at added."""
        standing = dataclasses.replace(state, held=self.cache.standing(state, exact))
        k, _, info = self.cache.decoded(standing, self.frequencies)
        mark, several = self.cache.policy.mark, self.asked.q.shape[1]
        marks = state.held.marks + mark(self.asked, k, info, self.rule, new=0)
        k = jnp.moveaxis(self.cache.turned(exact.k, exact.info, self.frequencies), 2, 1)
        one = jax.tree.map(lambda x: x[:, None], exact.info)
        late = exact.marks + jnp.moveaxis(mark(self.asked, k, one, self.rule, new=several), 1, 2)
        return dataclasses.replace(exact, marks=late), dataclasses.replace(state.held, marks=marks)

    def _queries(self, state: KVState, info: TokenInfo) -> dict[str, Any]:
        """The newest queries after a pass."""
        if not (several := state.newest.shape[1]):
            return {}
        new = jnp.where((info.segments != PADDING)[..., None, None], self.asked.q, 0).astype(state.newest.dtype)
        q = jnp.concatenate([state.newest, new], axis=1)
        info = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.newest_info, info)
        order = jnp.argsort(info.segments != PADDING, axis=1, stable=True)[:, -several:]
        return {"newest": taken(q, order), "newest_info": taken(info, order)}

    def _written(self, state: KVState, leaving: Waiting, moved: Int[Array, "B"]) -> KVState:
        """With `moved` tokens, whole blocks, behind those that the slots hold."""
        (B, L), block, layer = leaving.info.segments.shape, self.cache.codec.block, None
        if isinstance(held := state.held, Layered):
            held, layer = held.every, held.layer
        K, (G, S) = leaving.k.shape[2], held.info.segments.shape[-2:]
        used = state.used + moved[:, None]

        def write(held: Held) -> Held:
            by_head = lambda x: jnp.moveaxis(x, 1, 2)
            coded = [
                on_own_heads(coder.encode, by_head(x), known, rules=self.rules)
                for coder, x, known in zip(self.cache.coders, (leaving.k, leaving.v), state.tables, strict=True)
            ]
            info = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (B, G, *x.shape[1:])), leaving.info)
            marks = None if held.marks is None else by_head(leaving.marks)
            counts = None if held.counts is None else jnp.ones((B, K, L))
            old, new = (held.k, held.v, held.info, held.marks, held.counts), (*coded, info, marks, counts)
            options = {"blocks": L // block, "rules": self.rules, "layer": layer}
            k, v, info, marks, counts = with_blocks(old, new, state.used // block, moved // block, **options)
            new = replaced(held, k=k, v=v, info=info, marks=marks, counts=counts)
            if self.cache.selector is None:
                return new
            page = self.cache.selector.page
            touched = (state.used // page)[:, :, None] + jnp.arange(-(-L // page) + 1)
            touched = jnp.broadcast_to(touched, (B, K, touched.shape[2]))
            return self.cache.selector.told(self.cache, new, state.tables, self.frequencies, touched, layer)

        new = in_place(write, held, (moved > 0).any(), self.asked.out)
        return dataclasses.replace(
            state,
            held=new if layer is None else replaced(state.held, every=new),
            used=jnp.minimum(used, S),
            overflow=state.overflow + jnp.maximum(used - S, 0).max(axis=1),
        )

    def _compressed(
        self,
        state: KVState,
        leaving: Waiting,
        moved: Int[Array, "B"],
        budget: Int[Array, "B *K"] | None = None,
        slots: int | None = None,
    ) -> KVState:
        """With the policy's choice among what the slots hold and `moved` tokens more. budget, slots: None is the policy's, and
        as many as there are."""
        held, (B, L) = state.held, leaving.info.segments.shape
        K, (G, S) = leaving.k.shape[2], held.info.segments.shape[1:]
        by_head = lambda x: jnp.moveaxis(x, 1, 2)
        join = lambda a, b: jnp.concatenate([a, b], axis=2)
        pick = functools.partial(picked, rules=self.rules)
        here = jax.tree.map(lambda x: jnp.broadcast_to(x[:, None], (B, G, *x.shape[1:])), leaving.info)
        here = hidden(here, jnp.arange(L) < moved[:, None, None])
        info = jax.tree.map(join, held.info, here)
        marks = None if held.marks is None else join(held.marks, by_head(leaving.marks))
        counts = None if held.counts is None else join(held.counts, jnp.ones((B, K, L)))
        there = info.segments != PADDING
        count, order = there.sum(axis=2), places(there, there.shape[2])
        loose, (k, v) = self._loose(state, leaving, order)
        ordered, marked, counted = pick((info, marks, counts), order, growing=True)
        ordered = hidden(ordered, jnp.arange(there.shape[2]) < count[..., None])
        policy = self.cache.policy
        whole = policy.budget(state.seen, state.share)
        lost = jnp.minimum(whole, state.seen) - policy.most(state.length, state.share)
        scored = Scored(
            k=self.cache.turned_slots(k, ordered, self.frequencies),
            raw=k,
            v=v,
            info=ordered,
            count=count,
            newest=state.newest,
            newest_info=state.newest_info,
            marks=marked,
            counts=counted,
            watched=state.watched,
            known=state.known,
            seen=state.seen,
            budget=whole if budget is None else budget,
            output=None if self.asked is None else self.asked.output,
            frequencies=self.frequencies,
            rule=self.rule,
            leader=None if self.leader is None else self.leader.held.info,
        )
        kept = policy.compress(scored, S if slots is None else slots)
        last = jnp.where(kept.there, kept.index, 0).max(axis=2, keepdims=True)  # fills up a block that it is in
        index = jnp.where(kept.there, kept.index, last)
        origin = pick(order, index)
        codes = []
        for coder, old, new, known in zip(self.cache.coders, loose, (kept.k, kept.v), state.tables, strict=True):
            stays = pick(old, origin) if new is None else coder.loose(new, known)
            codes.append(on_own_heads(coder.tightened, stays, known, rules=self.rules, axis="slots"))
        block, some = self.cache.codec.block, kept.there.sum(axis=2)
        info, marks, counts = pick((info, marks, counts), origin)
        like = lambda new, old: new.astype(old.dtype)
        new = Held(
            k=jax.tree.map(like, codes[0], held.k),
            v=jax.tree.map(like, codes[1], held.v),
            info=hidden(info, kept.there),
            marks=marks,
            counts=counts if kept.counts is None else kept.counts,
            pages=held.pages,
        )
        if self.cache.selector is not None:
            new = self.cache.selector.told(self.cache, new, state.tables, self.frequencies)
        return dataclasses.replace(state, held=new, used=-(-some // block) * block, overflow=jnp.maximum(state.overflow, lost))

    def _loose(
        self, state: KVState, leaving: Waiting, order: Int[Array, "B G N"]
    ) -> tuple[list[Any], list[Float[Array, "B K N _"]]]:
        """Loose codes of the keys and values of the slots and of tokens behind them, and in order what they stand for."""
        held, join = state.held, lambda a, b: jnp.concatenate([a, b], axis=2)
        loose, floats = [], []
        for coder, codes, new, known in zip(
            self.cache.coders, (held.k, held.v), (leaving.k, leaving.v), state.tables, strict=True
        ):
            old, new = coder.loosened(codes, known), jnp.moveaxis(new, 1, 2)
            loose.append(jax.tree.map(join, old, coder.loose(new, known)))
            exact = loose[-1] if coder.exact else join(coder.value(old, known).astype(jnp.float32), new.astype(jnp.float32))
            floats.append(picked(exact, order, rules=self.rules, growing=True).astype(jnp.float32))
        return loose, floats


def _where(rows: Bool[Array, "B"], some: KVState, others: KVState) -> KVState:
    """Some rows of one state and the others of another; what has no rows is in both."""
    choose = lambda a, b: a if a is b else jnp.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
    return jax.tree.map(choose, some, others)
