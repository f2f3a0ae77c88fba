"""Generation: prompts of any lengths prefilled in chunks, then decoded one token a step under one jitted loop.

The generator owns `seen [B]`, the tokens each row has consumed, and makes each chunk's TokenInfo from it. A finished row is
fed padding, which changes nothing in any state. A row's tokens do not depend on the rows beside it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lcx.batch import PADDING, Batch, causal_info
from lcx.inference.placed import behind, padded_positions
from lcx.inference.sampling import Sampling
from lcx.inference.shapes import bucket, right_padded
from lcx.models.decoder import DecoderModel, settled
from lcx.parallel.rules import Rules, ambient_mesh
from lcx.positions.length_rule import length_policy
from lcx.positions.visual import Placed
from lcx.record import record
from lcx.spec import SpecError

ASK_EVERY = 32  # tokens decoded before `until` is asked again

Until = Callable[[Sequence[int]], bool]


class Generated(NamedTuple):
    """ids: the new tokens, the stop token left out. logprobs: of each, under the model. finish: why it ended."""

    ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


@record
class Consumed:
    """What the rows have read. last: the hidden state at each row's newest token. seen: tokens consumed. most: tokens that a
    row may consume in all, which a length-dependent rope reads. following: the position of the token of index `since`, from
    which those behind it count on."""

    last: Float[Array, "B M"]
    state: Any
    seen: Int[Array, "B"]
    most: Int[Array, "B"]
    following: Float[Array, "B"]
    since: Int[Array, "B"]


@record
class Decoding:
    """The decoding loop after `n` steps. count: new tokens of each row, in the first columns of ids and logprobs."""

    n: Int[Array, ""]
    read: Consumed
    ids: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    count: Int[Array, "B"]
    stopped: Bool[Array, "B"]


def generate(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    sampling: Sampling = Sampling(),
    seeds: Sequence[int] | None = None,
    stop: Sequence[int] = (),
    until: Sequence[Until | None] | None = None,
    chunk: int = 512,
    placed: Sequence[Placed] | None = None,
) -> list[Generated]:
    """Up to `max_new` tokens after each prompt of token ids, ended by any id of `stop`.

    seeds: one a row, default its place. until: one a row; asked now and then with the row's new ids, True ends the row, which
    may by then be longer than the asker needs. chunk: tokens a prefill step. placed: the positions of each prompt, from a rule
    for visual documents; new tokens go on behind them. Raises ValueError on an empty prompt, an id that the model does not
    have, a seed outside 32 bits, max_new < 1, positions that are not those of the prompts, or new ones beyond 2^24.
    """
    if max_new < 1 or not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError(f"generate: max_new = {max_new} and {len(prompts)} prompts: expected at least one token of each")
    seeds = range(len(prompts)) if seeds is None else seeds
    until = [None] * len(prompts) if until is None else until
    if not len(seeds) == len(until) == len(prompts):
        raise ValueError(f"generate: {len(seeds)} seeds and {len(until)} conditions for {len(prompts)} prompts")
    rows, new = padded_rows(len(prompts), model.spec.rules), bucket(max_new)
    model = settled(model)
    read = prefill(model, prompts, rows, max_new, chunk, placed)
    keys = jax.vmap(jax.random.key)(np.asarray([*map(checked_seed, seeds), *[0] * (rows - len(prompts))], np.uint32))
    stops = np.asarray(sorted(set(stop)), np.int32)
    decoding = nothing_decoded(read, new, jnp.arange(rows) >= len(prompts))
    ask = max_new if not any(until) else ASK_EVERY
    for end in (*range(ask, max_new, ask), max_new):
        decoding = decode(model, decoding, keys, stops, jnp.int32(end), sampling)
        if end < max_new:
            made = _rows(decoding)
            asked = [u is not None and u(row.ids) for u, row in zip(until, made, strict=False)]
            stopped = np.asarray(decoding.stopped) | np.pad(asked, (0, rows - len(asked)))
            if stopped.all():
                break
            decoding = dataclasses.replace(decoding, stopped=jnp.asarray(stopped))
    return _rows(decoding)[: len(prompts)]


def prefill(
    model: DecoderModel,
    prompts: Sequence[Sequence[int]],
    rows: int,
    max_new: int,
    chunk: int,
    placed: Sequence[Placed] | None = None,
) -> Consumed:
    """`rows` rows that have read the prompts, `chunk` tokens a step, with room for `max_new` tokens more."""
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
    return read


def nothing_decoded(read: Consumed, new: int, stopped: Bool[Array, "B"]) -> Decoding:
    """The loop before its first step, with room for `new` tokens a row."""
    rows = len(stopped)
    ids, logprobs = jnp.zeros((rows, new), jnp.int32), jnp.zeros((rows, new), jnp.float32)
    return Decoding(n=jnp.int32(0), read=read, ids=ids, logprobs=logprobs, count=jnp.zeros(rows, jnp.int32), stopped=stopped)


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


def checked_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 32:
        raise SpecError(f"seed = {seed}: expected 0 to 2^32 - 1")
    return seed


@functools.partial(jax.jit, static_argnames=("rows", "length"))
def nothing_read(
    model: DecoderModel, rows: int, length: int, most: Int[Array, "B"], following: Float[Array, "B"], since: Int[Array, "B"]
) -> Consumed:
    """Rows that have room for `length` tokens each, on the ambient mesh as the model's rules say."""
    last, seen = jnp.zeros((rows, model.spec.width), model.spec.compute), jnp.zeros(rows, jnp.int32)
    state = model.init_state(rows, length)
    return Consumed(last=last, state=state, seen=seen, most=most, following=following, since=since)


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
    return dataclasses.replace(read, last=last, state=state, seen=seen)


@functools.partial(jax.jit, static_argnames="sampling", donate_argnames="decoding")
def decode(
    model: DecoderModel,
    decoding: Decoding,
    keys: Key[Array, "B"],
    stops: Int[Array, "n"],
    end: Int[Array, ""],
    sampling: Sampling,
) -> Decoding:
    """Steps until every row has stopped or `end` steps are done."""
    step = functools.partial(_step, model, keys=keys, stops=stops, sampling=sampling)
    return jax.lax.while_loop(lambda now: (now.n < end) & ~now.stopped.all(), step, decoding)


def _step(model: DecoderModel, now: Decoding, *, keys: Key[Array, "B"], stops: Int[Array, "n"], sampling: Sampling) -> Decoding:
    """The rows after one token more, each chosen and read; those that have stopped stay as they are."""
    logits = model.logits(now.read.last)
    token = sampling.choose(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, now.n))
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
    stopped = now.stopped | (token[:, None] == stops).any(axis=1)
    segments = jnp.where(stopped, PADDING, 1)[:, None]
    return Decoding(
        n=now.n + 1,
        read=feed(model, token[:, None], segments, now.read),
        ids=now.ids.at[:, now.n].set(token),
        logprobs=now.logprobs.at[:, now.n].set(logprob),
        count=now.count + jnp.where(stopped, 0, 1),
        stopped=stopped,
    )


def _rows(decoding: Decoding) -> list[Generated]:
    ids, logprobs, count, stopped = map(np.asarray, (decoding.ids, decoding.logprobs, decoding.count, decoding.stopped))
    return [
        Generated(ids[b, :n].tolist(), logprobs[b, :n].tolist(), "stop" if stopped[b] else "length")
        for b, n in enumerate(count)
    ]
