"""Decoding: one token a step for every row, under one jitted loop. A row's tokens do not depend on the rows beside it."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lcx.batch import PADDING
from lcx.inference.overflow import unplaced
from lcx.inference.reading import Consumed, feed
from lcx.inference.sampling import SamplingRows
from lcx.models.decoder import DecoderModel
from lcx.record import record
from lcx.spec import SpecError


@record
class Asked:
    """What the rows are to do. key: of a row's draws. made: tokens that it had before the loop began, which number its draws;
    limit: the most in all. stops: ids that end it, -1 is none."""

    key: Key[Array, "B"]
    sampling: SamplingRows
    stops: Int[Array, "B S"]
    made: Int[Array, "B"]
    limit: Int[Array, "B"]


@record
class Decoding:
    """The loop after `n` steps. count: new tokens of each row, in the first columns of ids and logprobs. top_ids, top_logprobs:
    the likeliest tokens beside each, the likeliest first. unplaced: tokens of each row that found no slot in some cache."""

    n: Int[Array, ""]
    read: Consumed
    ids: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    top_ids: Int[Array, "B N L"]
    top_logprobs: Float[Array, "B N L"]
    count: Int[Array, "B"]
    stopped: Bool[Array, "B"]
    unplaced: Int[Array, "B"]


def nothing_decoded(read: Consumed, new: int, stopped: Bool[Array, "B"], top: int = 0) -> Decoding:
    """The loop before its first step, with room for `new` tokens a row and the `top` likeliest beside each."""
    rows = len(stopped)
    ids, logprobs = jnp.zeros((rows, new), jnp.int32), jnp.zeros((rows, new), jnp.float32)
    tops = jnp.zeros((rows, new, top), jnp.int32), jnp.zeros((rows, new, top), jnp.float32)
    count = jnp.zeros(rows, jnp.int32)
    return Decoding(
        n=jnp.int32(0),
        read=read,
        ids=ids,
        logprobs=logprobs,
        top_ids=tops[0],
        top_logprobs=tops[1],
        count=count,
        stopped=stopped,
        unplaced=jnp.zeros(rows, jnp.int32),
    )


def stop_rows(stops: Sequence[Sequence[int]]) -> Int[np.ndarray, "B S"]:
    """Ids that end each row, in as many columns as a power of two."""
    most = max(map(len, stops), default=0)
    width = 1 << max(most - 1, 0).bit_length()
    return np.asarray([[*row, *[-1] * (width - len(row))] for row in map(sorted, map(set, stops))], np.int32)


def checked_seed(seed: int) -> int:
    if not 0 <= seed < 1 << 32:
        raise SpecError(f"seed = {seed}: expected 0 to 2^32 - 1")
    return seed


def keys_of(seeds: Sequence[int]) -> Key[Array, "B"]:
    """Raises SpecError for a seed outside 32 bits."""
    return jax.vmap(jax.random.key)(np.asarray([*map(checked_seed, seeds)], np.uint32))


@functools.partial(jax.jit, donate_argnames="decoding")
def decode(model: DecoderModel, decoding: Decoding, asked: Asked, end: Int[Array, ""]) -> Decoding:
    """Steps until every row has stopped or `end` steps are done."""
    model = model.in_blocks()
    step = functools.partial(_step, model, asked=asked)
    made = jax.lax.while_loop(lambda now: (now.n < end) & ~now.stopped.all(), step, decoding)
    return dataclasses.replace(made, unplaced=unplaced(made.read.state, len(made.count)))


def _step(model: DecoderModel, now: Decoding, *, asked: Asked) -> Decoding:
    """The rows after one token more, each chosen and read; those that have stopped stay as they are."""
    logits = model.logits(now.read.last)
    token = asked.sampling.choose(logits, jax.vmap(jax.random.fold_in)(asked.key, asked.made + now.n))
    logprobs = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0]
    stopped = now.stopped | (token[:, None] == asked.stops).any(axis=1)
    count = now.count + jnp.where(stopped, 0, 1)
    tops = jax.lax.top_k(logprobs, top) if (top := now.top_ids.shape[2]) else (now.top_logprobs[:, 0], now.top_ids[:, 0])
    segments = jnp.where(stopped, PADDING, 1)[:, None]
    return Decoding(
        n=now.n + 1,
        read=feed(model, token[:, None], segments, now.read),
        ids=now.ids.at[:, now.n].set(token),
        logprobs=now.logprobs.at[:, now.n].set(logprob),
        top_ids=now.top_ids.at[:, now.n].set(tops[1]),
        top_logprobs=now.top_logprobs.at[:, now.n].set(tops[0]),
        count=count,
        stopped=stopped | (asked.made + count >= asked.limit),
        unplaced=now.unplaced,
    )
