"""Titans MAC, memory as context (Behrouz et al. 2024): attention within segments, to which a memory adds what came before.

For each segment S of `memory.chunk` tokens of a document, with the memory as the segment before left it:

    h_i = memory(q(x_i))                                        read before anything of S is written
    y_i = attention of x_i over persistent tokens, h_j and x_j with j <= i
    the memory writes y; m_i is what it answers to q(y_i) with the writes of tokens j <= i
    o_i = norm(y_i) * act(norm(m_i))

The paper shows token i all of h, which knows the queries of later tokens, and the memory behind all of S; here nothing of the
future is seen. A token and what is recalled for it stand at its place in the segment: positions never grow beyond it.

Segments follow each other, so a row lies whole on each device; mesh axes of the sequence repeat its work.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.attention.mask import Causal
from lcx.batch import PADDING, Batch, TokenInfo
from lcx.memory.document_chunks import document_chunks
from lcx.mixers.attention import Attention
from lcx.mixers.mixer import Inherited, Mixer, MixerModule, Place, residual_gain
from lcx.mixers.neighbours import resumed, torn
from lcx.mixers.neural_memory import NeuralMemory, NeuralMemoryModule, mean_error
from lcx.mixers.titans import ACTS
from lcx.norms import Norm, RMSNorm
from lcx.parallel.rules import shard
from lcx.record import record
from pallas_kernels.fast_weight.chunks import Held
from pallas_kernels.fast_weight.op import Open, State, absorbed, empty, heads_first, next_token, run_chunk
from pallas_kernels.grouped_scan import chosen, grouped_scan

NAMES = ("query", "key", "value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TitansMAC(Mixer):
    """attention: within a segment, which is `memory.chunk` tokens long. act: of the memory's normalised output. kept: segments
    whose start the backward pass keeps one of."""

    attention: Attention
    memory: NeuralMemory
    act: Literal["silu", "sigmoid"] = "silu"
    norm: Norm = RMSNorm()
    kept: int = 4
    sequential = True
    recurrent = True
    chunked = True
    by_index = True

    def validate(self):
        self.check(self.attention.mask == Causal(), "attention", "one whose mask is Causal(): a segment is its window")
        plain = self.attention.distances is None and self.attention.query_scale is None
        self.check(plain, "attention", "one without distances and query_scale: places do not grow beyond a segment")
        self.check(self.kept >= 1, "kept", "at least 1")

    def build(self, inherited, *, rngs):
        return TitansMACModule(self, inherited, rngs)

    @classmethod
    def examples(cls):
        attention = Attention(heads=4, kv_heads=2, head_dim=4, persistent=2)
        return (cls(attention=attention, memory=NeuralMemory(heads=2, head_dim=4, chunk=4, expand=2)),)


@record
class MACState:
    """memory: State at the start of the open segment. opened: its steps so far. attention: its keys and values. raw:
    projections of its y, [B,C,H,D] each, and past: of the tokens before it. recall: the convolution of queries of x."""

    memory: Any
    opened: Any
    attention: Any
    raw: Any
    past: Any
    recall: Any
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class TitansMACModule(MixerModule):
    def __init__(self, spec: TitansMAC, inherited: Inherited, rngs: nnx.Rngs):
        self.spec, self.outer = spec, inherited
        self.inherited = dataclasses.replace(inherited, rules=dataclasses.replace(inherited.rules, sequence=()))
        self.attention = spec.attention.build(self.inherited, rngs=rngs)
        self.memory = NeuralMemoryModule(spec.memory, self.inherited, rngs, gated=False)
        self.recall_norm, self.attention_norm, self.memory_norm = (spec.norm.build(inherited.width) for _ in range(3))

    def __call__(self, x: Float[Array, "B T M"], batch: Batch, state: Any = None, *, place: Place = Place()):
        info, rules = batch.info, self.inherited.rules
        x = shard(x, rules, "batch", None, None)
        asked, at_recall = self.memory._local(x, "query", info, state and state.recall)
        real = info.segments != PADDING
        if state is None:
            out, loss = self._whole_rows(x, asked, info, place)
            broken = torn(info, within=False)
        elif x.shape[1] == 1:
            out, loss, state, lost = *self._one(x, asked, info, state, place), None
        else:
            out, loss, state, lost = self._more(x, asked, info, state, place)
        if state is not None:
            broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=lost)
            state = dataclasses.replace(state, recall=at_recall, index=index, segments=segments)
        out = jnp.where(broken[..., None], jnp.nan, out)
        error = mean_error(loss, jnp.broadcast_to(real[..., None], loss.shape).astype(jnp.float32))
        return shard(out, self.outer.rules, "batch", "sequence", None), state, {"memory_error": error}

    def _whole_rows(self, x, asked, info: TokenInfo, place: Place):
        size, first = self.spec.memory.chunk, self.memory.first
        chunks = document_chunks(info, size, self.inherited.documents)
        rows, n = chunks.count.shape
        cut = lambda y: jnp.moveaxis(y.reshape(rows, n, size, *y.shape[2:]), 1, 0)
        filled = cut(chunks.source < x.shape[1])
        start = jax.tree.map(lambda w: jnp.broadcast_to(w, (rows, *w.shape)), first)

        def step(carried, given):
            part, flags = given
            begins, whole, live = flags

            def run(carried):
                memory, past = carried
                memory, past = chosen(begins, first, memory), self._past_at(begins, past)
                out, loss, after, ended = self._segment(memory, past, *part, place=place)[:4]
                return (chosen(whole, after, memory), chosen(whole, ended, past)), (out, loss)

            def skip(carried):
                nothing = jnp.zeros_like(part[0])
                return carried, (nothing, jnp.zeros((*part[0].shape[:2], self.spec.memory.heads), jnp.float32))

            return jax.lax.cond(live, run, skip, carried)

        parts = (cut(chunks.gather(x)), cut(chunks.gather(asked)), filled)
        flags = (chunks.begins.T, (chunks.count == size).T, chunks.live)
        _, (out, loss) = grouped_scan(step, (start, self._no_past(rows, x.dtype)), (parts, flags), group=self.spec.kept)
        join = lambda y: jnp.moveaxis(y, 0, 1).reshape(rows, n * size, *y.shape[3:])
        return chunks.scatter(join(out)), chunks.scatter(join(loss))

    def _more(self, x, asked, info: TokenInfo, state: MACState, place: Place):
        """The open segment goes on, others follow, and the last of them stays open."""
        size, first = self.spec.memory.chunk, self.memory.first
        opened: Open = state.opened
        chunks = document_chunks(info, size, self.inherited.documents, opened.filled.sum(axis=1))
        rows, n = chunks.count.shape
        cut = lambda y: jnp.moveaxis(y.reshape(rows, n, size, *y.shape[2:]), 1, 0)
        pieces = [cut(y) for y in (chunks.gather(x), chunks.gather(asked), chunks.source < x.shape[1])]
        nothing = opened._replace(filled=jnp.zeros_like(opened.filled))

        def piece(carried, part, flags, attention, held):
            memory, past, newest = carried
            begins, count = flags
            memory, past = chosen(begins, first, memory), self._past_at(begins, past)
            out, loss, after, ended, attention, now, raw = self._segment(
                memory, past, *part, place=place, attention=attention, held=held
            )
            whole = count == size
            now = now._replace(filled=now.filled & ~whole[:, None])
            newest = (now, raw, attention) if newest is None else chosen(count > 0, (now, raw, attention), newest)
            return (chosen(whole, after, memory), chosen(whole, ended, past), newest), (out, loss)

        def step(carried, given):
            return piece(carried, *given, self._no_keys(rows), (nothing, state.raw))

        flags = chunks.begins.T, chunks.count.T
        at = lambda m: jax.tree.map(lambda y: y[m], (pieces, flags))
        carried, found = piece((state.memory, state.past, None), *at(0), state.attention, (opened, state.raw))
        (memory, past, newest), more = jax.lax.scan(step, carried, at(slice(1, None)))
        join = lambda y, more: jnp.moveaxis(jnp.concatenate([y[None], more]), 0, 1).reshape(rows, n * size, *y.shape[2:])
        out, loss = (chunks.scatter(join(*both)) for both in zip(found, more, strict=True))
        now, raw, attention = newest
        attention = chosen(now.filled.any(axis=1), attention, self._no_keys(rows))
        state = dataclasses.replace(state, memory=memory, opened=now, attention=attention, raw=raw, past=past)
        return out, loss, state, chunks.lost

    def _one(self, x, asked, info: TokenInfo, state: MACState, place: Place):
        """One token a row."""
        size, first, rows = self.spec.memory.chunk, self.memory.first, x.shape[0]
        index, real = info.index[:, 0], info.segments[:, 0] != PADDING
        begins, slot = real & (index == 0), index % size
        memory, past = chosen(begins, first, state.memory), self._past_at(begins, state.past)
        opened: Open = state.opened._replace(filled=state.opened.filled & ~begins[:, None])
        attention = chosen(begins, self._no_keys(rows), state.attention)
        recalled = self._recalled(memory, asked, x.dtype)
        y, attention = self._attend(recalled, x, slot[:, None], real[:, None], place, attention)
        new = {name: self.memory.raw(y, name) for name in NAMES}
        at = (jnp.arange(size) == slot[:, None]) & real[:, None]
        raw = {name: jnp.where(at[..., None, None], new[name], state.raw[name]) for name in NAMES}

        def taken(name):
            wide = jnp.concatenate([past[name], raw[name]], axis=1)
            window = jax.vmap(lambda row, s: jax.lax.dynamic_slice_in_dim(row, s, self._taps, axis=0))(wide, slot)
            found = self._convolved(window[:, : self._taps - 1], window[:, self._taps - 1 :], name)
            return self.memory.finished(found, name)

        q, k, v = map(taken, NAMES)
        gates = self.memory.gates_of(y, jnp.broadcast_to(real[:, None, None], q.shape[:3]).astype(jnp.float32))
        arrays = jax.tree.map(heads_first, (q, k, v, gates))
        out, loss, after = next_token(self.memory.kind, memory, opened, slot, arrays)
        opened = chosen(real, after, opened)
        whole = real & (slot == size - 1)
        memory = chosen(whole, absorbed(self.memory.kind, memory, opened), memory)
        past = chosen(whole, self._ended(past, raw), past)
        attention = chosen(whole, self._no_keys(rows), attention)
        opened = opened._replace(filled=opened.filled & ~whole[:, None])
        tokens_first = lambda x: jnp.moveaxis(x, 1, 2)
        state = dataclasses.replace(state, memory=memory, opened=opened, attention=attention, raw=raw, past=past)
        return self._joined(y, tokens_first(out)), tokens_first(loss), state

    def _segment(self, memory: State, past, x, asked, filled, *, place: Place, attention=None, held=None):
        """One segment of all rows, its tokens in slots that are `filled`: (out, loss, memory and past projections behind it,
        keys of the attention, steps and projections of the segment). held: steps and projections of tokens read earlier."""
        size = x.shape[1]
        recalled = self._recalled(memory, asked, x.dtype)
        slots = jnp.broadcast_to(jnp.arange(size), filled.shape)
        y, attention = self._attend(recalled, x, slots, filled, place, attention)
        raw = {name: self.memory.raw(y, name) for name in NAMES}
        if held is not None:
            opened, earlier = held
            raw = {name: jnp.where(opened.filled[..., None, None], earlier[name], raw[name]) for name in NAMES}
        q, k, v = (self.memory.finished(self._convolved(past[name], raw[name], name), name) for name in NAMES)
        real = jnp.broadcast_to(filled[..., None], q.shape[:3]).astype(jnp.float32)
        q, k, v, gates = jax.tree.map(heads_first, (q, k, v, self.memory.gates_of(y, real)))
        steps = None
        if held is not None:
            rows = lambda x: opened.filled.reshape(len(filled), 1, size, *[1] * (x.ndim - 3))
            gates = jax.tree.map(lambda old, new: jnp.where(rows(new), old, new), opened.gates, gates)
            steps, filled = Held(opened.steps, opened.filled), filled | opened.filled
        out, after, loss, taken = run_chunk(self.memory.kind, memory, (q, k, v, gates), steps)
        tokens_first = lambda x: jnp.moveaxis(x, 1, 2)
        joined = self._joined(y, tokens_first(out))
        return joined, tokens_first(loss), after, self._ended(past, raw), attention, Open(taken, gates, filled), raw

    def _recalled(self, memory: State, asked: Float[Array, "B r H D"], dtype) -> Float[Array, "B r M"]:
        """What the memory answers to queries of x, as inputs of the attention."""
        kind = self.memory.kind
        over_heads = jax.vmap(lambda weights, q: kind.network(weights, q))
        found = jax.vmap(over_heads)(memory.weights, heads_first(asked))
        return self.recall_norm(self.memory.joined(self.memory.norm(jnp.moveaxis(found, 1, 2)), dtype))

    def _attend(self, recalled, x, slots: Int[Array, "B r"], real: Bool[Array, "B r"], place: Place, attention):
        """y of tokens, beside each of which stands what was recalled for it."""
        twice = lambda y: jnp.concatenate([y, y], axis=1)
        at, segments = twice(slots), twice(real.astype(jnp.int32))
        info = TokenInfo(index=at, order=at, positions=at[..., None].astype(jnp.float32), segments=segments)
        batch = Batch(tokens=jnp.zeros_like(at), info=info)
        y, attention, _ = self.attention(jnp.concatenate([recalled, x], axis=1), batch, attention, place=place)
        return y[:, x.shape[1] :], attention

    def _joined(self, y, out):
        held = self.memory_norm(self.memory.joined(self.memory.norm(out), y.dtype))
        return self.attention_norm(y) * ACTS[self.spec.act](held) * residual_gain(self.inherited)

    @property
    def _taps(self) -> int:
        return max(1, self.spec.memory.taps)

    def _convolved(self, past: Float[Array, "B before H D"], raw: Float[Array, "B r H D"], name: str):
        if not self.spec.memory.taps:
            return raw
        kernel, wide = self.memory.kernel_of(name).astype(raw.dtype), jnp.concatenate([past, raw], axis=1)
        last, length = self._taps - 1, raw.shape[1]
        return sum(kernel[n] * wide[:, last - n : last - n + length] for n in range(self._taps))

    def _ended(self, past, raw):
        """The past of the next segment, behind a whole one."""
        wide = {name: jnp.concatenate([past[name], raw[name]], axis=1) for name in NAMES}
        return {name: y[:, y.shape[1] - (self._taps - 1) :] for name, y in wide.items()}

    def _no_past(self, rows: int, dtype):
        memory = self.spec.memory
        return {name: jnp.zeros((rows, self._taps - 1, memory.heads, memory.head_dim), dtype) for name in NAMES}

    def _past_at(self, begins: Bool[Array, "B"], past):
        """Nothing stands before a document."""
        return jax.tree.map(lambda x: jnp.where(begins.reshape(-1, 1, 1, 1), 0, x), past)

    def _no_keys(self, rows: int):
        return self.attention.init_state(rows, 2 * self.spec.memory.chunk)

    def init_state(self, batch_size, length):
        memory, size, dtype = self.memory, self.spec.memory.chunk, jnp.dtype(self.inherited.compute)
        first = jax.tree.map(lambda w: jnp.broadcast_to(w, (batch_size, *w.shape)), memory.first)
        none = jnp.zeros(batch_size, jnp.int32)
        raw = {name: jnp.zeros((batch_size, size, memory.spec.heads, memory.spec.head_dim), dtype) for name in NAMES}
        return MACState(
            memory=first,
            opened=empty(memory.kind, memory.first.weights, memory.no_gates, batch_size, size),
            attention=self._no_keys(batch_size),
            raw=raw,
            past=self._no_past(batch_size, dtype),
            recall=memory.init_state(batch_size, length).query,
            index=none,
            segments=none,
        )
