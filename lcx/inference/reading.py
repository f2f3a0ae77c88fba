"""Reading prompts: rows of any lengths, in chunks, into the state of a model.

Whoever generates owns `seen [B]`, the tokens each row has consumed, and makes each chunk's TokenInfo from it. Padding changes
nothing in any state, wherever it stands.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcx.attention.split_keys import split_axes
from lcx.batch import PADDING, Batch, causal_info
from lcx.cache.cache import Cache
from lcx.inference.placed import behind, padded_positions
from lcx.inference.shapes import bucket, right_padded
from lcx.models.decoder import Decoder, DecoderModel
from lcx.parallel.gathered import axes_size
from lcx.parallel.rules import Rules, ambient_mesh
from lcx.positions.length_rule import length_policy
from lcx.positions.visual import Placed
from lcx.record import record, static
from lcx.spec import SpecError, below


@record
class Consumed:
    """What the rows have read. last: the hidden state at each row's newest token. seen: tokens consumed. most: tokens that a
    row may consume in all, which a length-dependent rope reads. following: the position of the token of index `since`, from
    which those behind it count on. room: tokens of a row that the state was made for."""

    room: int = static()
    last: Float[Array, "B M"]
    state: Any
    seen: Int[Array, "B"]
    most: Int[Array, "B"]
    following: Float[Array, "B"]
    since: Int[Array, "B"]


def prefill(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    rows: int,
    max_new: int,
    chunk: int,
    placed: Sequence[Placed] | None = None,
) -> Consumed:
    """`rows` rows that have read the prompts, `chunk` tokens a step, with room for `max_new` tokens more; twice, where a policy
    judges by that.

    Raises ValueError if a cache has none, or `placed` tokens would be read twice."""
    from lcx.inference.rereading import read_again, rereading

    check_room(model.spec, [*map(len, prompts)], max_new)
    if placed is not None and rereading(model.spec) is not None:
        raise ValueError("placed: expected None beside a policy that has prompts read again, as text behind what was read")
    longest = bucket(max(map(len, prompts)))
    tokens, segments = right_padded(prompts, longest, rows, model.spec.vocab)
    most = np.asarray([*map(len, prompts), *[0] * (rows - len(prompts))], np.int32) + max_new
    positions, following, since = None, np.zeros(rows, np.float32), np.zeros(rows, np.int32)
    if placed is not None:
        positions = padded_positions(model.spec, prompts, placed, longest, rows)
        following, since = behind(placed, rows, max_new)
    read = nothing_read(model, rows, longest + bucket(max_new), most, following, since)
    for start in range(0, longest, chunk):
        part = slice(start, start + chunk)
        read = feed(model, tokens[:, part], segments[:, part], read, None if positions is None else positions[:, part])
    return read_again(model, read, prompts)


def padded_rows(prompts: int, rules: Rules) -> int:
    """Rows that so many prompts are padded to: a power of two that the devices of the ambient mesh share out.

    Raises ValueError where a row would be shared out, of whose answer one token comes at a time.
    """
    mesh, rows = ambient_mesh(), 1 << (prompts - 1).bit_length()
    if mesh is None:
        return rows
    if several := [axis for axis in rules.sequence if mesh.shape[axis] > 1]:
        raise ValueError(f"generate: rows are shared out over {', '.join(several)}: expected whole rows, a token at a time")
    shards = math.prod(mesh.shape[axis] for axis in rules.batch)
    return -(-rows // shards) * shards


def check_room(spec: Decoder, prompts: Sequence[int], new: int) -> None:
    """Raises SpecError if a cache has no room for rows of prompts of so many tokens, and as many new ones behind each."""
    for path, part in below(spec, "model"):
        if isinstance(part, Cache) and part.room is not None and new > part.room:
            raise SpecError(
                f"{path}.policy.every = {part.room}: expected at least {new}, an answer's tokens, as it drops in prefill alone"
            )
        if isinstance(part, Cache) and not part.fits([length + new for length in prompts]):
            total = f"{sum(prompts) + len(prompts) * new} tokens in {len(prompts)} rows"
            raise SpecError(f"{path} = {part}: expected a cache with room for {total}")


def check_not_consumed(read: Consumed) -> None:
    """Raises ValueError if a pass took the arrays of these rows: what comes after them is elsewhere."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(read) if isinstance(leaf, jax.Array)):
        wanted = "the rows that came back, or those of another `prefill` or `restore`"
        raise ValueError(f"read: these rows were answered, or fed, before, which consumed them: expected {wanted}")


@functools.partial(jax.jit, static_argnames=("rows", "length"))
def nothing_read(
    model: DecoderModel, rows: int, length: int, most: Int[Array, "B"], following: Float[Array, "B"], since: Int[Array, "B"]
) -> Consumed:
    """Rows that have room for `length` tokens each or more, on the ambient mesh as the model's rules say."""
    length = -(-length // (shares := axes_size(split_axes(model.spec.rules)))) * shares
    last, seen = jnp.zeros((rows, model.spec.width), model.spec.compute), jnp.zeros(rows, jnp.int32)
    state = model.apart(model.init_state(rows, length))
    return Consumed(room=length, last=last, state=state, seen=seen, most=most, following=following, since=since)


@functools.partial(jax.jit, donate_argnames="read")
def feed(
    model: DecoderModel,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    read: Consumed,
    positions: Float[Array, "B T P"] | None = None,
) -> Consumed:
    """The rows after one more chunk; padding, which may stand anywhere in it, is not read. The old `read` is consumed.

    positions: of the chunk; by default they go on behind what was read.
    """
    return passed(model, tokens, segments, read, positions)[1]


def passed(
    model: DecoderModel,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    read: Consumed,
    positions: Float[Array, "B T P"] | None = None,
) -> tuple[Float[Array, "B T M"], Consumed]:
    """(hidden states of the chunk, the rows after it), as `feed`."""
    real = segments != PADDING
    seen = read.seen + real.sum(axis=1, dtype=jnp.int32)
    lengths = {None: None, "frozen": read.most, "growing": seen}[length_policy(model.spec)]
    if lengths is not None:
        lengths = jnp.broadcast_to(lengths[:, None], segments.shape)
    info = causal_info(segments, start=read.seen, lengths=lengths)
    behind = (read.following[:, None] + (info.index - read.since[:, None]))[..., None]
    info = dataclasses.replace(info, positions=behind if positions is None else positions)
    hidden, state, _ = model(Batch(tokens=tokens, info=info), read.state)
    newest = tokens.shape[1] - 1 - jnp.argmax(real[:, ::-1], axis=1)
    last = jnp.take_along_axis(hidden, newest[:, None, None], axis=1)[:, 0]
    last = jnp.where(real.any(axis=1, keepdims=True), last, read.last)
    return hidden, dataclasses.replace(read, last=last, state=state, seen=seen)
