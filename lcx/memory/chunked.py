"""Fast weights over documents: chunks begin with documents, and these with learned weights.

The whole row, chunks of any sizes and single tokens give the same. A state holds the weights at the start of the newest token's
chunk, and the steps that its tokens took so far, which are read through the chunk's coefficients until it is whole.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcx.batch import PADDING, TokenInfo
from lcx.memory.document_chunks import document_chunks
from lcx.mixers.neighbours import resumed, torn
from lcx.record import record
from pallas_kernels.fast_weight.chunks import Held
from pallas_kernels.fast_weight.op import (
    Axes,
    Course,
    FastWeight,
    Gates,
    Open,
    State,
    absorbed,
    empty,
    fast_weight,
    heads_first,
    next_token,
    run_chunk,
)
from pallas_kernels.grouped_scan import chosen


@record
class ChunkedState:
    """memory: at the start of the open chunk. index, segments: of the newest token; segment 0: none."""

    memory: Any
    opened: Any
    index: Int[Array, "B"]
    segments: Int[Array, "B"]


def first_state(kind: FastWeight, first: State, gates: Gates, rows: int, chunk: int) -> ChunkedState:
    """Before any token. first: leaves [H,...]. gates: of the shapes that `run` gets, batch and length aside."""
    memory = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), first)
    none = jnp.zeros(rows, jnp.int32)
    return ChunkedState(memory=memory, opened=empty(kind, first.weights, gates, rows, chunk), index=none, segments=none)


def run(
    kind: FastWeight,
    first: State,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T H D"],
    v: Float[Array, "B T H E"],
    gates: Gates,
    info: TokenInfo,
    state: ChunkedState | None,
    *,
    chunk: int,
    documents: int,
    axes: Axes = ((), ()),
) -> tuple[Float[Array, "B T H E"], ChunkedState | None, Float[Array, "B T H"]]:
    """(out, state, loss of each token where its gradient is taken); of padding 0. What cannot be answered is NaN, and so is
    what follows it in its document: tokens beyond the documents that there is room for, or behind a gap, or of a row that
    begins within a document.

    first: leaves [H,...]. gates: [B,T,H,...] or None; the last is that of `real_tokens`. axes: of the mesh, that share out rows
    and heads.
    """
    arrays = (q, k, v, gates)
    if state is None:
        out, loss = _whole_rows(kind, first, arrays, info, chunk, documents, axes)
        broken = torn(info, within=False)
    else:
        lost = None
        if q.shape[1] == 1:
            out, loss, memory, opened = _one(kind, first, arrays, info, state, chunk)
        else:
            out, loss, memory, opened, lost = _more(kind, first, arrays, info, state, chunk, documents, axes)
        broken, index, segments = resumed(info, state.index, state.segments, within=False, lost=lost)
        state = ChunkedState(memory=memory, opened=opened, index=index, segments=segments)
    return jnp.where(broken[..., None, None], jnp.nan, out), state, loss


def real_tokens(info: TokenInfo, heads: int) -> Float[Array, "B T H"]:
    """1 where a token is, 0 where padding is: the last gate of `run`."""
    return jnp.broadcast_to((info.segments != PADDING)[..., None], (*info.shape, heads)).astype(jnp.float32)


def _whole_rows(kind: FastWeight, first: State, arrays, info: TokenInfo, chunk: int, documents: int, axes: Axes):
    chunks = document_chunks(info, chunk, documents)
    course = Course(chunks.begins, chunks.count == chunk, chunks.live, first)
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (info.shape[0], *x.shape)), first)
    out, _, loss = fast_weight(kind, start, *jax.tree.map(chunks.gather, arrays), chunk=chunk, course=course, axes=axes)
    return chunks.scatter(out), chunks.scatter(loss)


def _more(kind: FastWeight, first: State, arrays, info: TokenInfo, state: ChunkedState, chunk: int, documents: int, axes: Axes):
    """The open chunk goes on, others follow, and the last of them stays open."""
    opened: Open = state.opened
    chunks = document_chunks(info, chunk, documents, opened.filled.sum(axis=1))
    laid = jax.tree.map(chunks.gather, arrays)
    q, k, v, new = jax.tree.map(lambda x: heads_first(x[:, :chunk]), laid)
    held = jax.tree.map(functools.partial(_in_rows, opened.filled), opened.gates, new)
    going = (q, k, v, held)
    out, after, loss, taken = run_chunk(kind, state.memory, going, Held(opened.steps, opened.filled))
    whole = chunks.count == chunk
    memory = chosen(whole[:, 0], after, state.memory)
    course = Course(chunks.begins[:, 1:], whole[:, 1:], chunks.live[1:], first)
    others = jax.tree.map(lambda x: x[:, chunk:], laid)
    outs, memory, losses = fast_weight(kind, memory, *others, chunk=chunk, course=course, axes=axes)
    tokens_first = lambda x, more: jnp.concatenate([jnp.moveaxis(x, 1, 2), more], axis=1)
    out, loss = chunks.scatter(tokens_first(out, outs)), chunks.scatter(tokens_first(loss, losses))

    n = chunks.count.shape[1]
    last = jnp.max(jnp.where(chunks.count > 0, jnp.arange(n), 0), axis=1)
    slots = last[:, None] * chunk + jnp.arange(chunk)
    of_last = lambda x: jnp.take_along_axis(x, slots.reshape(*slots.shape, *[1] * (x.ndim - 2)), axis=1)
    newest = jax.tree.map(lambda x: heads_first(of_last(x)), laid)
    same = last == 0
    newest_steps = run_chunk(kind, memory, newest)[3]
    filled = of_last(chunks.source) < info.shape[1]
    filled = jnp.where(same[:, None], filled | opened.filled, filled) & ~jnp.take_along_axis(whole, last[:, None], axis=1)
    steps, gates = chosen(same, (taken, held), (newest_steps, newest[3]))
    return out, loss, memory, Open(steps, gates, filled), chunks.lost


def _one(kind: FastWeight, first: State, arrays, info: TokenInfo, state: ChunkedState, chunk: int):
    """One token a row: a row of the coefficients, and now and then the whole chunk's step."""
    index, real = info.index[:, 0], info.segments[:, 0] != PADDING
    begins = real & (index == 0)
    memory = chosen(begins, first, state.memory)
    opened: Open = state.opened._replace(filled=state.opened.filled & ~begins[:, None])
    out, loss, after = next_token(kind, memory, opened, index % chunk, jax.tree.map(heads_first, arrays))
    opened = chosen(real, after, opened)
    whole = real & (index % chunk == chunk - 1)
    fold = lambda memory: chosen(whole, absorbed(kind, memory, opened), memory)
    memory = jax.lax.cond(whole.any(), fold, lambda memory: memory, memory)
    tokens_first = lambda x: jnp.moveaxis(x, 1, 2)
    return tokens_first(out), tokens_first(loss), memory, opened._replace(filled=opened.filled & ~whole[:, None])


def _in_rows(filled: Bool[Array, "B b"], held: Float[Array, "B H b ..."], new: Float[Array, "B H b ..."]) -> Array:
    return jnp.where(filled.reshape(filled.shape[0], 1, filled.shape[1], *[1] * (held.ndim - 3)), held, new)
