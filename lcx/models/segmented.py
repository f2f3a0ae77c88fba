"""A decoder that reads segment after segment, with a memory between them (`Decoder.memory`).

The last layer of a segment feeds the first layer of the next, so segments are the outer loop: one segment's activations are
alive at a time, and a row's work is not shared between devices. Hidden states come back for the tokens of the batch alone, in
their order; documents of a row know nothing of each other.

A state holds the bank, the last tokens of the segment before, and the decoder's own state of the open segment. When a segment
is whole, its vectors are written and that state begins anew.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, Batch, TokenInfo, causal_info, document_lengths
from lcx.memory.document_chunks import DocumentChunks, document_chunks
from lcx.memory.lora import LoRAModule, adapted
from lcx.mixers.mixer import Mixer
from lcx.mixers.neighbours import resumed, torn
from lcx.models.decoder import Decoder, DecoderModel
from lcx.record import record
from lcx.spec import below
from pallas_kernels.grouped_scan import chosen, grouped_scan


@record
class SegmentedState:
    """bank: of the memory. tail: the newest tokens that it reads again, -1 where there are none. front: what it put in front of
    the open segment. decoder: state of that segment, of which `read` positions and `filled` tokens were fed. index, segments:
    of the newest token."""

    bank: Any
    tail: Int[Array, "B k"]
    front: Float[Array, "B p M"]
    decoder: Any
    read: Int[Array, "B"]
    filled: Int[Array, "B"]
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


class SegmentedModel(DecoderModel):
    """Parameters are the decoder's, and `memory`."""

    def __init__(self, spec: Decoder, rngs: nnx.Rngs):
        super().__init__(spec, rngs)
        self.reads_neighbours = any(isinstance(part, Mixer) and part.sequential for _, part in below(spec))
        self.memory = spec.memory.build(spec.width, rngs=rngs)
        self.encoder = None if spec.memory.encoder is None else LoRAModule(spec.memory.encoder, self.slots, rngs)

    def __call__(self, batch: Batch, state: Any = None, *, upto: int | None = None):
        """Hidden states after the final norm. Raises ValueError for `upto`, embeddings, or a state beside a memory that reads
        ahead."""
        if upto is not None or batch.embeds is not None:
            raise ValueError("decoder.memory: expected neither upto nor embeddings in a batch that is read by segments")
        batch = jax.tree.map(jnp.asarray, batch)
        if state is None:
            return self._whole_rows(batch)
        if self.memory.ahead:
            raise ValueError("model.memory.query = 'ahead': expected 'behind' in generation, where later tokens are not known")
        return self._more(batch, state)

    def _whole_rows(self, batch: Batch):
        size, info, places = self.spec.memory.segment, batch.info, batch.side.get("places")
        if places is None:
            chunks = document_chunks(info, size, self.spec.documents)
        else:
            given = dataclasses.replace(info, index=places)
            chunks = document_chunks(given, size, self.spec.documents, shortest=self.spec.memory.shortest)
        tokens, real = _laid(chunks, batch.tokens)
        rows = tokens.shape[1]
        first = self.memory.empty(rows), self._no_tail(rows)

        def step(carried, given):
            tokens, real, begins, live = given

            def run(carried):
                bank, tail = chosen(begins, first, carried)
                vectors, there = self._recalled(bank, tail, tokens, real)
                hidden, behind, aux = self._segment(bank, vectors, there, tail, tokens, real)
                return (self.memory.written(bank, behind), self._tail(tail, tokens, real)), (hidden, aux)

            shapes = jax.eval_shape(lambda: run(carried)[1])
            skip = lambda carried: (carried, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
            return jax.lax.cond(live, run, skip, carried)

        given = tokens, real, chunks.begins.T, chunks.live
        bptt = self.spec.memory.bptt
        group = bptt or max(1, round(len(tokens) ** 0.5))
        _, (hidden, aux) = grouped_scan(step, first, given, group=group, truncated=bptt is not None, again=True)
        hidden = chunks.join(hidden)
        aux = jax.tree.map(lambda x: x.sum() / jnp.maximum(chunks.live.sum(), 1), aux)
        return jnp.where(torn(info, within=False)[..., None], jnp.nan, hidden), None, aux

    def autoencoded(self, batch: Batch) -> Float[Array, "B T M"]:
        """Hidden states from which each token of a document is to be predicted, given the vectors of all its segments, the mark
        of autoencoding and the tokens before it. Raises ValueError for a memory without an encoder."""
        if self.encoder is None:
            raise ValueError(f"decoder.memory: {type(self.spec.memory).__name__}: expected one with an encoder, as ICAE")
        batch = jax.tree.map(jnp.asarray, batch)
        size, info, slots = self.spec.memory.segment, batch.info, self.spec.memory.slots
        chunks = document_chunks(info, size, self.spec.documents)
        tokens, real = _laid(chunks, batch.tokens)
        rows, n = chunks.count.shape
        there = chunks.count > 0
        behind = jnp.broadcast_to(self.memory.summary[...], (rows, slots, self.spec.width))

        def encode(given):
            tokens, real = given
            return self._encoded(tokens, real, behind, jnp.broadcast_to(real.any(axis=1, keepdims=True), (rows, slots)))

        encoded = jax.lax.map(jax.checkpoint(encode), (tokens, real))
        vectors = jnp.moveaxis(encoded, 0, 1).reshape(rows, n * slots, -1)
        first = lambda field: chunks.gather(field).reshape(rows, n, size)[:, :, 0]  # of each segment's first token
        segments, place, lengths = (first(field) for field in (info.segments, info.index // size, document_lengths(info)))
        marks = jnp.broadcast_to(self.memory.autoencoding[...], (rows, n, self.spec.width))
        wide = lambda x: jnp.repeat(x, slots, axis=1)
        whole = slots * (-(-document_lengths(info) // size))
        index = [
            wide(place) * slots + jnp.tile(jnp.arange(slots), (rows, n)),
            slots * (-(-lengths // size)),
            whole + 1 + info.index,
        ]
        ids = [wide(jnp.where(there, segments, PADDING)), jnp.where(chunks.begins, segments, PADDING), info.segments]
        index, ids = jnp.concatenate(index, axis=1), jnp.concatenate(ids, axis=1)
        joined = _sequence([(vectors, wide(there)), (marks, chunks.begins), (batch.tokens, info.segments != PADDING)])
        text = TokenInfo(index=index, order=index, positions=index[..., None].astype(jnp.float32), segments=ids)
        order = jnp.lexsort((index, ids, ids == PADDING), axis=1)
        given = jax.tree.map(_moved(order), dataclasses.replace(joined, info=text))
        hidden = _moved(jnp.argsort(order, axis=1))(DecoderModel.__call__(self, given)[0])
        of_marks, of_tokens = hidden[:, n * slots : n * slots + n], hidden[:, n * slots + n :]
        before = jnp.pad(of_tokens, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        chunk = jnp.minimum(chunks.slot // size, n - 1)[..., None]
        hidden = jnp.where((info.index == 0)[..., None], jnp.take_along_axis(of_marks, chunk, axis=1), before)
        return jnp.where((torn(info, within=False) | chunks.lost)[..., None], jnp.nan, hidden)

    def _segment(self, bank, vectors, there, tail, tokens, real):
        """(hidden states of the tokens, of the vectors behind them, aux) of one segment of all rows."""
        kept = self._kept(tail)
        behind = self.memory.behind(bank, vectors)
        some = jnp.broadcast_to(real.any(axis=1, keepdims=True), behind.shape[:2])
        given = [(vectors, there), (kept, kept >= 0), (tokens, real), (behind, some)]
        hidden, _, aux = self._read(_sequence(given if self.encoder is None else given[:-1]))
        front = vectors.shape[1] + kept.shape[1]
        left = hidden[:, front + tokens.shape[1] :] if self.encoder is None else self._encoded(tokens, real, behind, some)
        return hidden[:, front : front + tokens.shape[1]], left, aux

    def _encoded(self, tokens, real, behind, there):
        """Hidden states of the vectors behind a segment that the encoder reads by itself."""
        hidden, _, _ = adapted(self, self.encoder)._read(_sequence([(tokens, real), (behind, there)]))
        return hidden[:, tokens.shape[1] :]

    def _recalled(self, bank, tail, tokens, real):
        """What the memory puts in front of a segment."""
        if not self.memory.asked:
            return self.memory.read(bank, None)
        given = tokens[:, : self.memory.asked] if self.memory.ahead else tail[:, tail.shape[1] - self.memory.asked :]
        there = real[:, : self.memory.asked] if self.memory.ahead else given >= 0
        mark = self.memory.mark(len(tail))
        always = jnp.ones((len(tail), 1), bool)
        hidden, _, _ = self._read(_sequence([(mark, always), (given, there), (mark, always)]))
        return self.memory.read(bank, hidden[:, -1])

    def _more(self, batch: Batch, state: SegmentedState):
        size, info = self.spec.memory.segment, batch.info
        lost = None
        if batch.shape[1] == 1:
            real = info.segments != PADDING
            given, join = (batch.tokens[None], real[None], (real & (info.index == 0)).T), lambda y: y[0]
        else:
            chunks = document_chunks(info, size, self.spec.documents, state.filled)
            given, join = (*_laid(chunks, batch.tokens), chunks.begins.T), chunks.join
            lost = chunks.lost
        broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=lost)
        state, (hidden, aux) = jax.lax.scan(self._piece, state, given)
        hidden = jnp.where(broken[..., None], jnp.nan, join(hidden))
        return hidden, dataclasses.replace(state, index=index, segments=segments), jax.tree.map(lambda x: x.mean(), aux)

    def _piece(self, state: SegmentedState, given):
        """Tokens of one segment of each row: what stands before it is read first, what stands behind it when it is whole."""
        tokens, real, begins = given
        rows = len(tokens)
        state = dataclasses.replace(
            state,
            bank=chosen(begins, self.memory.empty(rows), state.bank),
            tail=chosen(begins, self._no_tail(rows), state.tail),
            decoder=self._anew(begins, state.decoder),
            read=jnp.where(begins, 0, state.read),
            filled=jnp.where(begins, 0, state.filled),
        )
        opens = (state.filled == 0) & real.any(axis=1)
        state = jax.lax.cond(opens.any(), lambda state: self._opened(state, opens), lambda state: state, state)
        hidden, decoder, read, aux = self._fed([(tokens, real)], state.decoder, state.read)
        tail, filled = self._tail(state.tail, tokens, real), state.filled + real.sum(axis=1, dtype=jnp.int32)
        state = dataclasses.replace(state, tail=tail, decoder=decoder, read=read, filled=filled)
        whole = filled == self.spec.memory.segment
        return jax.lax.cond(whole.any(), lambda state: self._closed(state, whole), lambda state: state, state), (hidden, aux)

    def _opened(self, state: SegmentedState, opens: Bool[Array, "B"]) -> SegmentedState:
        vectors, there = self._recalled(state.bank, state.tail, None, None)
        kept = self._kept(state.tail)
        parts = [(vectors, there & opens[:, None]), (kept, (kept >= 0) & opens[:, None])]
        _, decoder, read, _ = self._fed(parts, state.decoder, state.read)
        return dataclasses.replace(state, front=chosen(opens, vectors, state.front), decoder=decoder, read=read)

    def _closed(self, state: SegmentedState, whole: Bool[Array, "B"]) -> SegmentedState:
        behind = self.memory.behind(state.bank, state.front)
        there, decoder, read = jnp.broadcast_to(whole[:, None], behind.shape[:2]), state.decoder, state.read
        if self.encoder is None:
            hidden, decoder, read, _ = self._fed([(behind, there)], decoder, read)
        else:
            hidden = self._encoded(state.tail, state.tail >= 0, behind, there)
        return dataclasses.replace(
            state,
            bank=chosen(whole, self.memory.written(state.bank, hidden), state.bank),
            decoder=self._anew(whole, decoder),
            read=jnp.where(whole, 0, read),
            filled=jnp.where(whole, 0, state.filled),
        )

    def _fed(self, parts, decoder: Any, read: Int[Array, "B"]):
        """(hidden, state, positions read, aux) of the decoder over the next positions of its segment."""
        batch = _sequence(parts, read)
        hidden, decoder, aux = self._read(batch, decoder)
        return hidden, decoder, read + (batch.info.segments != PADDING).sum(axis=1, dtype=jnp.int32), aux

    def _read(self, batch: Batch, decoder: Any = None):
        """(hidden, state, aux) of the decoder; where it reads neighbours, padding stands behind all that is there."""
        if not self.reads_neighbours or batch.shape[1] == 1:
            return super().__call__(batch, decoder)
        order = jnp.argsort(batch.info.segments == PADDING, axis=1, stable=True)
        hidden, decoder, aux = super().__call__(jax.tree.map(_moved(order), batch), decoder)
        return _moved(jnp.argsort(order, axis=1))(hidden), decoder, aux

    def _anew(self, rows: Bool[Array, "B"], decoder: Any) -> Any:
        """The decoder's state, empty in some rows; states of layers are stacked in front."""
        fresh = self._empty_decoder(len(rows))
        layers = lambda old, new: jax.vmap(lambda old, new: chosen(rows, new, old))(old, new)
        return {
            "embed": chosen(rows, fresh["embed"], decoder["embed"]),
            "layers": jax.tree.map(layers, decoder["layers"], fresh["layers"]),
        }

    def _empty_decoder(self, rows: int) -> Any:
        vectors, behind = self._around(rows)
        room = vectors.shape[1] + self.memory.sensory + self.spec.memory.segment + behind.shape[1]
        return super().init_state(rows, room)

    def _around(self, rows: int):
        """Vectors in front of and behind a segment, of an empty bank."""
        bank = self.memory.empty(rows)
        query = jnp.zeros((rows, self.spec.width)) if self.memory.asked else None
        vectors, _ = self.memory.read(bank, query)
        return vectors, self.memory.behind(bank, vectors)

    def _kept(self, tail: Int[Array, "B k"]) -> Int[Array, "B sensory"]:
        return tail[:, tail.shape[1] - self.memory.sensory :]

    @property
    def _tail_size(self) -> int:
        asked = 0 if self.memory.ahead else self.memory.asked
        return max(self.memory.sensory, asked, 0 if self.encoder is None else self.spec.memory.segment)

    def _no_tail(self, rows: int) -> Int[Array, "B k"]:
        return jnp.full((rows, self._tail_size), -1)

    def _tail(self, tail, tokens, real):
        """The newest tokens, in their order behind places that have none."""
        wide = jnp.concatenate([tail, jnp.where(real, tokens, -1)], axis=1)
        order = jnp.argsort(wide >= 0, axis=1, stable=True)
        return jnp.take_along_axis(wide, order, axis=1)[:, wide.shape[1] - tail.shape[1] :]

    def init_state(self, batch_size, length):
        none = jnp.zeros(batch_size, jnp.int32)
        return SegmentedState(
            bank=self.memory.empty(batch_size),
            tail=self._no_tail(batch_size),
            front=self._around(batch_size)[0],
            decoder=self._empty_decoder(batch_size),
            **dict.fromkeys(("read", "filled", "index", "segments"), none),
        )


def _laid(chunks: DocumentChunks, tokens: Int[Array, "B T"]):
    """(tokens [n,B,size], which are there)."""
    return chunks.cut(tokens), chunks.cut(jnp.ones_like(tokens)) > 0


def _moved(order: Int[Array, "B S"]):
    """Takes the places of each row in this order."""
    return lambda x: jnp.take_along_axis(x, order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)


def _sequence(parts, start: Int[Array, "B"] | None = None) -> Batch:
    """One text of vectors and tokens, each with which of them are there."""
    segments = jnp.concatenate([there.astype(jnp.int32) for _, there in parts], axis=1)
    width = max((part.shape[-1] for part, _ in parts if part.ndim == 3), default=None)
    ids = [part if part.ndim == 2 else jnp.full(part.shape[:2], -1) for part, _ in parts]
    embeds = None
    if width is not None:
        as_vectors = lambda part: part if part.ndim == 3 else jnp.zeros((*part.shape, width))
        embeds = jnp.concatenate([as_vectors(part).astype(jnp.float32) for part, _ in parts], axis=1)
    return Batch(tokens=jnp.concatenate(ids, axis=1), info=causal_info(segments, start), embeds=embeds)
